"""Runs the CUDA step on the host under a sanitizer, in tensors with nothing around them.

usage: run_cases.py MODULE matrix | overread | barriers
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

# Not this file's folder, but the tests'.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from cuda_on_host.build import load  # noqa: E402
from cuda_on_host.step import HostStep  # noqa: E402
from czm_fused.ops.step.spec import FIELD  # noqa: E402
from helpers.cases import (  # noqa: E402
    DTYPES,
    MEAN,
    OPTION_CASES,
    OTHER_CASES,
    SHAPE_CASES,
    Case,
    Options,
)
from helpers.problem import Problem, step_arguments  # noqa: E402
from helpers.stand_in import standing_in  # noqa: E402

# `PATH_CASES` for blocks of two warps.
PATHS = {
    "some filters a warp": Case((9, 16, 3, 3)),
    "warp": Case((3, 64, 3, 3)),
    "block": Case((2, 96, 3, 3), layout="channels_last"),
    "staged some filters a warp": Case((9, 5, 3, 3), torch.bfloat16, options=MEAN),
    "staged warp": Case((3, 65, 3, 3), torch.bfloat16, options=MEAN),
    "staged block": Case((2, 95, 3, 3), torch.bfloat16, options=MEAN),
    "large warp": Case((2, 200, 3, 3)),
    "large block": Case((1, 400, 3, 3), layout="channels_last"),
    "staged large block": Case((1, 401, 3, 3), options=MEAN),
    "tiles": Case((1, 600, 3, 3), layout="channels_last"),
    "long channels": Case((1, 2, 3000)),
}


def in_tight_memory(case: Case) -> Problem:
    """Return a problem whose tensors are allocations of their own, so that overreads show."""
    problem = Problem(case)
    for memory in problem.memory.values():
        memory.tensor = memory.tensor.clone(memory_format=torch.preserve_format)
    return problem


def run(problems: list[Problem], *scales: torch.Tensor) -> None:
    torch.ops.czm_fused.step_(*step_arguments(problems, "cuda", *scales))


def check(case: Case) -> None:
    problem = in_tight_memory(case)
    run([problem])
    problem.check()


def matrix() -> None:
    cases = random.Random(0).sample([*OPTION_CASES, *SHAPE_CASES], 150)
    cases += [case for case in OTHER_CASES if sum(case.shape) < 50_000]
    cases += [Case((2, channels, 3, 3), dtype) for channels in (72, 143, 427) for dtype in DTYPES]
    for case in [*cases, *PATHS.values()]:
        check(case)
    problems = [in_tight_memory(case) for case in cases[:60]]
    run(problems, torch.tensor(2.0), torch.tensor(0.0))
    for problem in problems:
        problem.check(2.0)


class OverreadingStep(HostStep):
    """Takes filters for one weight larger than they are."""

    def __init__(self, tensors, device):
        super().__init__(tensors, device)
        self.descriptors[:, [FIELD["filter_numel"], FIELD["numel"]]] += 1


def overread() -> None:
    run([in_tight_memory(Case((1, 16, 1, 1), options=Options(zmg=0.0)))])


def barriers(kernels) -> None:
    """Run every path, and again without each of its barriers, each time in a process of its own."""
    for case in PATHS.values():
        check(case)
    print("paths done", flush=True)
    for name, case in PATHS.items():
        check(case)
        for number in range(kernels.barriers_met()):
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                kernels.skip_barrier(number)
                run([in_tight_memory(case)])
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(f"{name}: without barrier {number}: {'missed' if status == 0 else 'caught'}")


def main() -> None:
    kernels, task = load(Path(sys.argv[1])), sys.argv[2]
    step = OverreadingStep if task == "overread" else HostStep
    with standing_in(step.with_kernels(kernels)):
        if task == "barriers":
            barriers(kernels)
        else:
            {"matrix": matrix, "overread": overread}[task]()
    print("done")


if __name__ == "__main__":
    main()
