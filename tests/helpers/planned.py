"""A plan of a step, for tests that step it more than once or with hyperparameters of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor
from czm_fused.ops.step.plan import DevicePlan
from helpers.cases import Case
from helpers.problem import Problem
from helpers.stand_in import MakeStep, standing_in


class Planned:
    """A plan on the CPU.

    Args:
        make_step: makes what runs the step.
        backend: that it stands for.
        cases: the tensors, a group each.

    Attributes:
        problems: of the cases.
        grads: their gradients.
        rows: their hyperparameters.
    """

    def __init__(self, make_step: MakeStep, backend: str, cases: Sequence[Case]) -> None:
        self.problems = [Problem(case) for case in cases]
        self.grads = [problem["grad"] for problem in self.problems]
        self.rows = [problem.case.options.row() for problem in self.problems]
        tensors = [
            StepTensor.of(problem["param"], problem.case.flags, index)
            for index, problem in enumerate(self.problems)
        ]
        with standing_in(make_step):
            self._plan = DevicePlan(tensors, torch.device("cpu"), backend)

    def step(
        self,
        grads: list[Tensor],
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Make one step of all problems."""
        params = [problem["param"] for problem in self.problems]
        states = [
            {name: memory.tensor for name, memory in problem.memory.items()}
            for problem in self.problems
        ]
        inputs = self._plan.read(params, list(grads), states)
        self._plan.run(inputs, hyperparameters, grad_scale, found_inf)
