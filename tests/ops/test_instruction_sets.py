"""Every instruction set of the C++ kernel against the oracle, not only the machine's best."""

import bisect
import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from czm_fused.ops.step import operator
from czm_fused.ops.step.descriptors import StepTensor, build_descriptors
from czm_fused.ops.step.spec import FIELD
from czm_fused.ops.step.tensors import TensorReader
from helpers.cases import OPTION_CASES, OTHER_CASES, SHAPE_CASES
from helpers.problem import Problem, step_arguments
from helpers.step_backends import CPU

BLOCK_NUMEL = 1000
CASES = [
    case
    for case in SHAPE_CASES[::3] + OPTION_CASES[::7] + OTHER_CASES
    # Python copies a gradient of another layout before the kernel sees it.
    if case.grad_layout is None and 0 < np.prod(case.shape) < 20_000
]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"


def _tables(problems):
    """Return descriptors, gradients' addresses, hyperparameters, work, and what owns the memory."""
    arguments = step_arguments(problems, "cpu")
    params, grads, *state, all_flags, group_indices, hyperparameters, _, _, _ = arguments
    tensors = [
        StepTensor.of(param, flags, index)
        for param, flags, index in zip(params, all_flags, group_indices, strict=True)
    ]
    descriptors, work = build_descriptors(tensors, BLOCK_NUMEL)
    reader = TensorReader(tensors, descriptors, torch.device("cpu"))
    words = reader.read(params, grads, operator.states_of(state, all_flags)).addresses
    words = torch.frombuffer(bytearray(words), dtype=torch.int64)
    table = words[: -len(params)].view(len(params), -1)
    return table, words[-len(params) :].clone(), hyperparameters, work, arguments


def _step_range(instruction_set):
    """Return the kernel of one instruction set out of the module that ships."""
    import czm_fused._C_cpu as module

    name = (
        f"_ZN3czm{len(instruction_set)}{instruction_set}"
        "10step_rangeEPKNS_16TensorDescriptorEPKllPKNS_15GroupDescriptorEdll"
    )
    try:
        function = getattr(ctypes.CDLL(module.__file__), name)
    except AttributeError:
        pytest.skip(f"the cpu module of this platform has no {instruction_set} kernel")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, integer, pointer, ctypes.c_double, integer, integer]
    function.restype = None
    return function


RUNS_HERE = {
    "avx512": torch.cpu._is_avx512_supported,
    "avx2": torch.cpu._is_avx2_supported,
    "baseline": lambda: True,
}


@pytest.mark.skipif(CPU.obstacle is not None, reason="the native cpu module is not built")
@pytest.mark.parametrize("instruction_set", RUNS_HERE)
def test_step_range(instruction_set):
    if not RUNS_HERE[instruction_set]():
        pytest.skip(f"this processor has no {instruction_set}")
    step_range = _step_range(instruction_set)
    problems = [Problem(case, seed=seed) for seed, case in enumerate(CASES)]
    table, grads, groups, work, _keep = _tables(problems)
    # Parts that end inside filters and tensors.
    cuts = [0, *sorted(torch.randint(work, (50,), generator=torch.Generator().manual_seed(0))
                       .tolist()), work]
    for begin, end in zip(cuts, cuts[1:], strict=False):
        step_range(
            table.data_ptr(), grads.data_ptr(), len(table), groups.data_ptr(), 1.0, begin, end
        )
    for problem in problems:
        problem.check()


@pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not here")
@pytest.mark.parametrize("program", [CROSS_COMPILER, EMULATOR])
def test_aarch64_can_be_tested(program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")


@pytest.mark.skipif(
    not CSRC.is_dir() or shutil.which(CROSS_COMPILER) is None or shutil.which(EMULATOR) is None,
    reason="needs the C++ sources, a cross compiler and an emulator for aarch64",
)
def test_step_range_on_aarch64(tmp_path):
    program = tmp_path / "step_range"
    # As setup.py compiles it.
    command = [CROSS_COMPILER, "-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Werror"]
    command += ["-static", f"-I{CSRC}", "-o", str(program)]
    sources = [Path(__file__).with_name("step_range_program.cpp"), CSRC / "cpu/step_baseline.cpp"]
    subprocess.run([*command, *map(str, sources)], check=True)

    # The emulator takes a hundred times as long.
    problems = [Problem(case, seed=seed) for seed, case in enumerate(CASES[::3])]
    table, grads, groups, work, arguments = _tables(problems)
    steps = arguments[5]
    blocks = [memory.block for problem in problems for memory in problem.memory.values()] + steps
    image, offset_of = _image(blocks)
    addresses = table[:, : FIELD["param_remainder"] + 1]
    addresses.apply_(offset_of)
    grads.apply_(offset_of)
    header = np.array([len(table), len(groups), work, len(image)])
    given = b"".join(x.tobytes() for x in (header, table.numpy(), grads.numpy(), groups.numpy()))
    result = subprocess.run(
        [EMULATOR, str(program)], input=given + image, stdout=subprocess.PIPE, check=True
    ).stdout
    assert len(result) == len(image)
    for block in blocks:
        begin = offset_of(block.data_ptr())
        values = np.frombuffer(result[begin : begin + block.nbytes], dtype=np.uint8)
        block.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(values.copy()))
    for problem in problems:
        problem.check()


def _image(blocks):
    """Return the blocks' bytes in one piece, and the function from their addresses to offsets."""
    starts, begins, parts, size = [], [], [bytes(64)], 64
    for block in sorted(blocks, key=torch.Tensor.data_ptr):
        padding = -block.nbytes % 64
        starts.append(block.data_ptr())
        begins.append(size)
        parts += [block.reshape(-1).view(torch.uint8).numpy().tobytes(), bytes(padding)]
        size += block.nbytes + padding

    def offset_of(address):
        if address == 0:
            return 0
        number = bisect.bisect_right(starts, address) - 1
        return begins[number] + address - starts[number]

    return b"".join(parts), offset_of
