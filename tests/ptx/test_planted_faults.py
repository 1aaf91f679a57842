"""Faults planted in the step's kernels: the interpreter traps each, and nothing without them."""

from __future__ import annotations

import re

import pytest
import torch

from czm_fused.ops.step.spec import FIELD
from helpers.cases import DTYPES, LAYOUTS, PATH_CASES, Case, Options
from helpers.problem import Problem, step_arguments
from helpers.stand_in import standing_in
from helpers.step_backends import CUDA_PTX, TRITON_PTX, available, on, parameter
from ptx.parsing import Kernel, Trap
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


# The step asks whether addresses, taken together, are multiples of 16.
@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_test_of_alignment(dtype, backend):
    case = Case((3, 16, 3, 3), dtype, offset=1)
    # A thread of Triton's has four weights of a tile, which are 8 bytes of halves.
    mask = 7 if backend is TRITON_PTX and dtype.itemsize == 2 else 15
    change = replacing(rf"^and\.b(32|64)(.*), {mask}$", r"and.b\1\2, 0")
    assert_trapped("misaligned access", backend, case, change)


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


def barrier_sites(kernel: Kernel, reached: set[int]) -> list[int]:
    """Return the indices of the barriers that were reached."""
    instructions = enumerate(kernel.instructions)
    return [
        index
        for index, each in instructions
        if each.base in ("bar", "barrier") and index in reached
    ]


def _paths():
    for backend in available((CUDA_PTX, TRITON_PTX)):
        # The program of a Triton kernel has one path for each of these.
        short = {"32", "staged 64", "tiles"} if backend is TRITON_PTX else set(PATH_CASES)
        for name, case in PATH_CASES.items():
            quick = name in ("64", "staged 64", "tiles") and name in short
            marks = [] if quick else [pytest.mark.exhaustive]
            if name in short:
                yield parameter(backend, case, name=name, marks=marks)


@pytest.mark.parametrize(("case", "backend"), list(_paths()))
def test_each_barrier_removed_in_turn(case, backend):
    launch = run(backend, case).launches[-1]
    sites = barrier_sites(launch.kernel, launch.reached)
    assert sites or case.shape == PATH_CASES["plain"].shape
    missed = []
    for site in sites:
        def change(kernel):
            return kernel.with_lines(lambda index, text: "" if index == site else text)  # noqa: B023

        try:
            run(backend, case, change)
        except (Trap, AssertionError):
            continue
        missed.append(f"{site}: {launch.kernel.instructions[site].line}")
    if backend is CUDA_PTX:
        assert not missed, missed
    else:
        # Triton's compiler is more careful than it must be.
        assert len(missed) < len(sites), missed
