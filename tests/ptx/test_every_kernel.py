"""No kernel of the CUDA step is left out: each is chosen for some launch, and computes the step."""

import pytest
import torch

from helpers.cases import DTYPES, Case
from helpers.problem import Problem, step_arguments
from helpers.stand_in import standing_in
from helpers.step_backends import CUDA_PTX, on
from ptx import nvcc
from ptx.parsing import Kernel
from ptx.recorder import Recorder

pytestmark = pytest.mark.simulated

# Filters of a warp, and of as many threads as there are.
CASES = [Case((3, 17, 3, 3), dtype) for dtype in DTYPES]
CASES += [Case((1, 1300, 3, 3), dtype) for dtype in DTYPES]


@on((CUDA_PTX,))
def test_every_kernel_of_the_step(backend):
    from ptx.cuda_step import FEW_WORDS

    reached = set()
    for least_words in (0, FEW_WORDS + 1):
        for cases in ([case] for case in CASES):
            reached |= _kernels(backend, cases, least_words)
    reached |= _kernels(backend, CASES[: len(DTYPES)], 0)
    assert reached == set(Kernel.names(nvcc.compiled(nvcc.STEP)))


def _kernels(backend, cases, least_words):
    """Make a step, whose arguments need room for some words, and return its kernels."""
    recorder = Recorder()
    members = {"recorder": recorder, "least_words": least_words}
    problems = [Problem(case) for case in cases]
    with standing_in(type("RoomyStep", (backend.step_class,), members)):
        torch.ops.czm_fused.step_(*step_arguments(problems, backend.backend))
    for problem in problems:
        problem.check()
    return {launch.kernel.name for launch in recorder.launches}
