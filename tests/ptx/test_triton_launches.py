"""Launches of Triton's kernels, without a GPU: what each is told, and that it compiles once."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from czm_fused.ops.backends import interpreting_triton
from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor
from czm_fused.ops.step.plan import DevicePlan
from czm_fused.ops.step.spec import FIELD, HYPERPARAMETER_NAMES, StepFlag

triton = pytest.importorskip("triton")
step = importlib.import_module("czm_fused.ops.step.triton")

FILTER = StepFlag.MOMENTUM | StepFlag.EXP_SCALE | StepFlag.ZERO_MEAN | StepFlag.ANCHOR
HYPERPARAMETERS = Hyperparameters([[0.1] * len(HYPERPARAMETER_NAMES)])
# Short and long filters, in both layouts; one whose channels no tile has room for; blocks.
SHAPES = [(8, 16, 3, 3), (4, 512, 3, 3), (2, 1024, 3, 3), (3, 2, 2561), (5, 100), (12_000,), (7,)]


def make_state(param, flags):
    state = {"momentum_buffer": torch.zeros_like(param)}
    if flags & StepFlag.EXP_SCALE:
        state |= {
            name: torch.zeros(param.shape[0]) for name in ("log_scale", "log_scale_momentum_buffer")
        }
    return state


def make_params(dtype=torch.float32):
    params = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    params.append(torch.zeros(4, 512, 3, 3, dtype=dtype).to(memory_format=torch.channels_last))
    return params, [FILTER if param.dim() > 1 else StepFlag.MOMENTUM for param in params]


class Launches:
    """Takes the kernel's place, as Triton's binder and, once compiled, as the kernel itself."""

    def __init__(self):
        self.bound, self.direct = [], []

    def __getitem__(self, grid):
        def bind(*arguments, **options):
            self.bound.append((grid, arguments, options))
            return {grid: lambda *arguments: self.direct.append((grid, arguments))}

        return bind


@pytest.fixture
def launches(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(step, "step_kernel", launches)
    return launches


def test_reciprocals_divide_every_slot():
    most = max(shape.tile for shape in step.launch_shapes(torch.float32))
    slots, divisors = np.arange(most), np.arange(1, most + 1)[:, None]
    reciprocals = -(-(1 << step.RECIPROCAL_BITS) // divisors)
    # As the kernel has it, in int32.
    assert (slots * reciprocals).max() < 2**31
    np.testing.assert_array_equal(slots * reciprocals >> step.RECIPROCAL_BITS, slots // divisors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_filter_has_one_program(dtype):
    params, all_flags = make_params(dtype)
    tensors = [
        StepTensor.of(param, flags, 0) for param, flags in zip(params, all_flags, strict=True)
    ]
    plan = step.TritonStep([*tensors, None], torch.device("cpu"))
    for number, param in enumerate(params):
        items = plan._items[plan._items["tensor"] == number]
        filter_numel = plan.descriptors[number, FIELD["filter_numel"]]
        np.testing.assert_array_equal(items["first"], np.arange(0, param.numel(), filter_numel))
        np.testing.assert_array_equal(
            items["numel"], np.minimum(filter_numel, param.numel() - items["first"])
        )
    assert len(params) not in plan._items["tensor"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [0, 1], ids=["short", "long"])
def test_tiles_hold_whole_channels(dtype, length):
    params, all_flags = make_params(dtype)
    shape = step.launch_shapes(dtype)[length]
    tensors = [
        StepTensor.of(param, flags, 0) for param, flags in zip(params, all_flags, strict=True)
    ]
    for row in step.TritonStep(tensors, torch.device("cpu")).descriptors:
        channels, tile_channels, tiles = step.tiles_of(row, shape.tile)
        taps = row[FIELD["taps"]]
        assert channels * taps == row[FIELD["filter_numel"]]
        assert tile_channels * taps <= shape.tile
        if tile_channels:
            assert (tiles - 1) * tile_channels < channels <= tiles * tile_channels
            # Vectors of the tiles after the first are aligned as those of the first.
            assert tiles == 1 or tile_channels % 4 == 0
        else:
            assert taps > shape.tile // 4


def test_a_launch_for_the_short_filters_of_a_dtype_and_one_for_the_long(launches):
    params, all_flags = make_params()
    params += [torch.zeros(3, 4, dtype=torch.bfloat16)]
    all_flags += [FILTER & ~StepFlag.ZERO_MEAN]
    tensors = [
        StepTensor.of(param, flags, 0) for param, flags in zip(params, all_flags, strict=True)
    ]
    states = [make_state(param, flags) for param, flags in zip(params, all_flags, strict=True)]
    plan = DevicePlan(tensors, torch.device("cpu"), "triton")
    inputs = plan.read(params, [torch.ones_like(param) for param in params], states)
    plan.run(inputs, HYPERPARAMETERS, None, None)
    assert len(launches.bound) == 3
    # Programs follow one another over the launches.
    first = 0
    for grid, arguments, _ in launches.bound:
        assert arguments[4] == first
        first += grid[0]


def test_a_compiled_kernel_is_launched_without_the_binder(launches):
    params, all_flags = make_params()
    tensors = [
        StepTensor.of(param, flags, 0) for param, flags in zip(params, all_flags, strict=True)
    ]
    states = [make_state(param, flags) for param, flags in zip(params, all_flags, strict=True)]
    grads = [[torch.ones_like(param) for param in params] for _ in range(2)]
    plan = DevicePlan(tensors, torch.device("cpu"), "triton")
    for number in (0, 0, 1):
        plan.run(plan.read(params, grads[number], states), HYPERPARAMETERS, None, None)
    # Both of a step's launches were bound at the first step, and never again.
    assert len(launches.bound) == 2
    assert len(launches.direct) == 4
    for (grid, bound, options), (direct_grid, direct) in zip(
        launches.bound, launches.direct, strict=False
    ):
        assert grid == direct_grid
        constants = step.kernel_constants(
            torch.float32, False, step.launch_shapes(torch.float32)[options["num_warps"] != 2]
        )
        # The kernel's own launcher takes what the binder was told by name, too.
        assert direct == (*bound, *constants.values())
        # Nothing has moved, so no table was sent again.
        assert direct[0] is bound[0] and direct[1] is bound[1]
    items, arguments = launches.direct[-1][1][:2]
    assert items is launches.bound[0][1][0]
    assert arguments[: len(params)].tolist() == [grad.data_ptr() for grad in grads[1]]
    # GradScaler's tensors are arguments of another kernel.
    found_inf = torch.zeros(())
    plan.run(plan.read(params, grads[0], states), HYPERPARAMETERS, None, found_inf)
    assert len(launches.bound) == 4
    assert launches.bound[-1][1][6] is found_inf


def test_only_misaligned_tensors_are_read_one_element_at_a_time(launches):
    params = [torch.zeros(8, 16, 3, 3), torch.zeros(4, 512, 3, 3), torch.zeros(8, 3, 7, 7)]
    tensors = [StepTensor.of(param, FILTER, 0) for param in params]
    states = [make_state(param, FILTER) for param in params]
    plan = DevicePlan(tensors, torch.device("cpu"), "triton")
    aligned = [torch.ones_like(param) for param in params]
    off = torch.ones(params[0].numel() + 1)[1:].view_as(params[0])
    for grads, expected in [
        (aligned, {0: step.HELD_FEW, 1: step.HELD_MANY, 2: step.STREAMED}),
        ([off, *aligned[1:]], {0: step.STREAMED, 1: step.HELD_MANY, 2: step.STREAMED}),
        (aligned, {0: step.HELD_FEW, 1: step.HELD_MANY, 2: step.STREAMED}),
    ]:
        plan.run(plan.read(params, grads, states), HYPERPARAMETERS, None, None)
        table = (launches.direct or launches.bound)[-1][1][0]
        items = table.numpy().view(step.WORK_ITEM)
        paths = {number: set(items["path"][items["tensor"] == number]) for number in expected}
        assert paths == {number: {path} for number, path in expected.items()}
        np.testing.assert_array_equal(
            items["param"],
            [params[n].data_ptr() + 4 * first for n, first in items[["tensor", "first"]].tolist()],
        )


@pytest.fixture
def compiler(monkeypatch):
    """Triton takes this for a GPU: it compiles for it, and that is all."""
    from triton.backends.compiler import GPUTarget

    if interpreting_triton():
        pytest.skip("TRITON_INTERPRET is set, so nothing compiles")
    driver = SimpleNamespace(
        # No GPU has this number.
        get_current_device=lambda: -2,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def test_the_step_compiles_once_for_all_plans(compiler):
    constants = step.kernel_constants(torch.float32, False, step.launch_shapes(torch.float32)[0])
    tables = [torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)]
    kernels = {
        id(
            step.step_kernel.warmup(
                *tables, rows, groups, first, None, None, **constants, num_warps=2, grid=(1,)
            )
        )
        for rows, groups, first in [(1, 1, 0), (220, 2, 1), (16, 16, 16)]
    }
    # An address off its alignment, as a sum of a captured table's may be.
    tables = [table[1:] for table in tables]
    kernels.add(
        id(
            step.step_kernel.warmup(
                *tables, 3, 1, 5, None, None, **constants, num_warps=2, grid=(1,)
            )
        )
    )
    assert len(kernels) == 1


@pytest.mark.parametrize("backward", [False, True])
def test_noise_compiles_once_for_all_sizes(backward, compiler):
    import triton.language as tl

    kernel = importlib.import_module("czm_fused.ops.add_relu_noise.triton")._kernel
    tensors = [torch.zeros(16) for _ in range(4)]
    constants = {"COMPUTE_DTYPE": tl.float32, "INDEX": tl.int32, "CHANNELS_LAST": False}
    constants["BACKWARD"] = backward
    sizes = [(4096, 16, 16), (4095, 3, 5), (1, 1, 1), (17, 17, 1)]
    kernels = {
        id(kernel.warmup(*tensors, *numbers, **constants, BLOCK=1024, grid=(1,)))
        for numbers in sizes
    }
    assert len(kernels) == 1


@pytest.mark.parametrize(("name", "tensors"), [("_forward_kernel", 3), ("_backward_kernel", 5)])
def test_exp_scale_compiles_once_for_all_sizes(name, tensors, compiler):
    import triton.language as tl

    kernel = getattr(importlib.import_module("czm_fused.ops.exp_scale.triton"), name)
    memory = [torch.zeros(16) for _ in range(tensors)]
    kernels = {
        id(kernel.warmup(*memory, numel, COMPUTE_DTYPE=tl.float32, TILE=512, grid=(1,)))
        for numel in (1, 9, 16, 4608)
    }
    assert len(kernels) == 1
