"""Faults planted in the step's kernels: the interpreter traps each, and nothing without them."""

from __future__ import annotations

import importlib
import math
import re
from collections import defaultdict

import pytest
import torch

from czm_fused.ops.step.spec import FIELD
from helpers.cases import DTYPES, LAYOUTS, PATH_CASES, Case, Options
from helpers.problem import Problem, step_arguments
from helpers.stand_in import standing_in
from helpers.step_backends import CUDA_PTX, TRITON_PTX, available, on, parameter
from ptx.bounds import UNNEEDED_BARRIERS
from ptx.parsing import Trap
from ptx.recorder import Recorder

pytestmark = pytest.mark.simulated

on_both = on((CUDA_PTX, TRITON_PTX))


def run(backend, case, change=None, **members):
    """Make a step by changed kernels, and return the recorder of its launches."""
    recorder = Recorder(change)
    step_class = type("FaultyStep", (backend.step_class,), {"recorder": recorder, **members})
    problem = Problem(case)
    with standing_in(step_class):
        torch.ops.czm_fused.step_(*step_arguments([problem], backend.backend))
    problem.check()
    return recorder


def replacing(pattern, replacement):
    """Return what changes the instructions that match, of which there must be some."""

    def change(kernel):
        changed = []

        def line(index, text):
            new = re.sub(pattern, replacement, text)
            changed.extend([index] * (new != text))
            return new

        result = kernel.with_lines(line)
        assert changed, pattern
        return result

    return change


def assert_trapped(match, backend, case, change=None, **members):
    run(backend, case)
    with pytest.raises(Trap, match=match):
        run(backend, case, change, **members)


# The step asks whether addresses are multiples of 16.
@on((CUDA_PTX,))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_test_of_alignment(dtype, backend):
    case = Case((3, 16, 3, 3), dtype, offset=1)
    change = replacing(r"^and\.b(32|64)(.*), 15$", r"and.b\1\2, 0")
    assert_trapped("misaligned access", backend, case, change)


@on((TRITON_PTX,))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_items_stepped_in_vectors(dtype, backend, monkeypatch):
    case = Case((3, 16, 3, 3), dtype, offset=1)
    run(backend, case)
    # Not imported above, since there may be no Triton.
    step = importlib.import_module("czm_fused.ops.step.triton")
    monkeypatch.setattr(step, "_stream_misaligned", lambda *_: None)
    with pytest.raises(Trap, match="misaligned access"):
        run(backend, case)


@on_both
def test_half_a_shuffle_mask(backend):
    change = replacing(r"^(shfl\.sync.*), [^,]+$", r"\1, 65535")
    assert_trapped("does not name", backend, Case((3, 64, 3, 3)), change)


@on((CUDA_PTX,))
def test_a_barrier_of_a_warp_where_more_threads_share(backend):
    change = replacing(r"^bar(rier)?\.sync.*$", "bar.warp.sync -1")
    for path in ("64", "128", "256"):
        assert_trapped("race on shared memory", backend, PATH_CASES[path], change)


@on((TRITON_PTX,))
def test_a_barrier_of_a_warp_where_more_warps_share(backend):
    # Its warps pass sums of the whole program through shared memory.
    change = replacing(r"^bar\.sync.*$", "bar.warp.sync -1")
    assert_trapped("race on shared memory", backend, Case((3, 256, 3, 3)), change)


@on_both
@pytest.mark.parametrize("layout", [layout for layout, other in LAYOUTS if other is None])
@pytest.mark.parametrize("channels", [16, 17])
def test_a_filter_one_weight_too_long(channels, layout, backend):
    def initialised(self, tensors, device):
        backend.step_class.__init__(self, tensors, device)
        if backend is TRITON_PTX:
            for name in ("numel", "channels", "tile_channels"):
                self._items[name] += 1
        else:
            self.descriptors[:, [FIELD["filter_numel"], FIELD["numel"]]] += 1

    case = Case((1, channels, 1, 1), layout=layout, options=Options(zmg=0.0))
    assert_trapped("outside every tensor", backend, case, __init__=initialised)


@on_both
def test_a_work_item_given_to_two_blocks(backend):
    change = replacing(r"%ctaid\.x", "0")
    assert_trapped("blocks share a byte", backend, Case((20, 32, 3, 3)), change)


@on_both
def test_a_block_that_does_nothing(backend):
    def change(kernel):
        return kernel.with_lines(lambda index, text: "exit" if index == 0 else text)

    assert_trapped("is not written once", backend, Case((3, 16, 3, 3)), change)


def reached_barriers(backend, cases):
    """Return the barriers of each kernel that cases reach, with these cases."""
    reached = defaultdict(list)
    for case in cases:
        for launch in run(backend, case).launches:
            for site in launch.reached:
                if launch.kernel.instructions[site].base in ("bar", "barrier"):
                    reached[launch.kernel.name, site].append(case)
    return reached


def is_needed(backend, case, name, site):
    """Return True if a step without the barrier is trapped, or wrong."""

    def change(kernel):
        if kernel.name != name:
            return kernel
        return kernel.with_lines(lambda index, text: "" if index == site else text)

    try:
        run(backend, case, change)
    except (Trap, AssertionError):
        return True
    return False


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        parameter(backend, dtype, name=str(dtype), marks=marks)
        for backend in available((CUDA_PTX, TRITON_PTX))
        for dtype, marks in (
            # Triton's kernel has three times the barriers.
            (torch.float32, [pytest.mark.exhaustive] if backend is TRITON_PTX else []),
            (torch.bfloat16, []),
        )
    ],
)
def test_each_barrier_removed_in_turn(dtype, backend):
    cases = [case for case in PATH_CASES.values() if case.dtype == dtype]
    if backend is TRITON_PTX:
        # Its programs do not differ in how many threads share a filter.
        cases = [case for case in cases if math.prod(case.shape) < 5_000 or case.shape[0] == 1]
    reached = reached_barriers(backend, cases)
    assert reached
    unneeded = [
        (name, site)
        for (name, site), its_cases in reached.items()
        if not any(is_needed(backend, case, name, site) for case in its_cases)
    ]
    print(f"{backend}, {dtype}: {len(unneeded)} of {len(reached)} barriers are not needed")
    assert len(unneeded) <= UNNEEDED_BARRIERS[backend.backend], unneeded
