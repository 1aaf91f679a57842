"""How a step that is not the package's own takes the place of a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from czm_fused.ops import backends
from czm_fused.ops.step import operator, plan
from czm_fused.ops.step.descriptors import StepTensor

MakeStep = Callable[[Sequence[StepTensor | None], torch.device], Any]


@contextlib.contextmanager
def standing_in(make_step: MakeStep) -> Iterator[None]:
    """Let `make_step` make what runs the step of every plan made here, whatever its backend.

    Args:
        make_step: returns a step with `descriptors`, as `CudaStep` is one.
    """

    def make_runner(
        backend: str, tensors: Sequence[StepTensor | None], device: torch.device
    ) -> tuple[Any, Any]:
        step = make_step(tensors, device)
        return step, step.descriptors

    with (
        mock.patch.object(plan, "make_runner", make_runner),
        mock.patch.object(backends, "choose", lambda device, backend="auto": backend),
        # Plans of other steps.
        mock.patch.object(operator, "_PLANS", []),
    ):
        yield
