"""Every way to run the step: the package's backends, and others for GPU kernels without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from czm_fused.ops import backends
from helpers import triton_interpreter
from helpers.problem import Problem, step_arguments
from helpers.stand_in import MakeStep, standing_in


class StepBackend:
    """A backend of the package on a type of device.

    Attributes:
        name: in the names of tests.
        backend: what `czm_fused::step_` is asked for.
        device: where the tensors are.
        is_simulated: True for those that stand in for a GPU.
    """

    is_simulated = False

    def __init__(self, backend: str, device: str, name: str = "") -> None:
        self.name = name or f"{backend}-on-{device}"
        self.backend, self.device = backend, device

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU"
        return backends.problem(self.backend, self.device)

    def step(self, arguments: Sequence[Any]) -> None:
        """Call `czm_fused::step_`."""
        torch.ops.czm_fused.step_(*arguments)

    def run(
        self,
        problems: Sequence[Problem],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Make one step of all problems in one call."""
        self.step(step_arguments(problems, self.backend, grad_scale, found_inf))

    def __repr__(self) -> str:
        return self.name


class SimulatedStepBackend(StepBackend):
    """A GPU's backend, its kernel run on the CPU by something that stands in."""

    is_simulated = True

    def make_step(self) -> MakeStep:
        """Return the class of the step that stands in."""
        raise NotImplementedError

    def step(self, arguments: Sequence[Any]) -> None:
        with standing_in(self.make_step()):
            super().step(arguments)


class HostStepBackend(SimulatedStepBackend):
    """The source of the CUDA kernel, compiled for the host as one of `build.VARIANTS`."""

    def __init__(self, variant: str) -> None:
        super().__init__("cuda", "cpu", f"cuda-on-host-{variant}")
        self.variant = variant

    @functools.cached_property
    def obstacle(self) -> str | None:
        from cuda_on_host import build

        return build.obstacle()

    @functools.cached_property
    def step_class(self) -> Any:
        """The step, which counts its launches."""
        from cuda_on_host import build
        from cuda_on_host.step import HostStep

        return HostStep.with_kernels(build.kernels(self.variant))

    def make_step(self) -> MakeStep:
        return self.step_class


class PtxStepBackend(SimulatedStepBackend):
    """The PTX of the CUDA or the Triton kernel, interpreted."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend, "cpu", f"{backend}-ptx")

    @functools.cached_property
    def obstacle(self) -> str | None:
        if self.backend == "triton":
            return triton_interpreter.obstacle()
        from ptx import nvcc

        return nvcc.obstacle()

    @functools.cached_property
    def step_class(self) -> Any:
        """The step; its launches are in `recorder`."""
        from ptx.recorder import Recorder

        if self.backend == "cuda":
            from ptx.cuda_step import PtxCudaStep as PtxStep
        else:
            from ptx.triton_driver import PtxTritonStep as PtxStep
        # With `approx` instructions as wrong as they may be.
        return type(PtxStep.__name__, (PtxStep,), {"recorder": Recorder(approx_error=1.0)})

    def make_step(self) -> MakeStep:
        return self.step_class


class InterpretedStepBackend(StepBackend):
    """The Triton kernel under Triton's interpreter, in another process."""

    is_simulated = True

    def __init__(self) -> None:
        super().__init__("triton", "cpu", "triton-interpreted")

    @functools.cached_property
    def obstacle(self) -> str | None:
        return triton_interpreter.obstacle()

    def step(self, arguments: Sequence[Any]) -> None:
        triton_interpreter.interpreter().call("torch.ops.czm_fused:step_", *arguments)


REFERENCE = StepBackend("reference", "cpu")
CPU = StepBackend("cpu", "cpu")
HOST = HostStepBackend("small")
WHOLE_HOST = HostStepBackend("whole")
CUDA_PTX, TRITON_PTX = PtxStepBackend("cuda"), PtxStepBackend("triton")
INTERPRETED = InterpretedStepBackend()

NATIVE = (REFERENCE, CPU, StepBackend("triton", "cuda"), StepBackend("cuda", "cuda"))
SIMULATED = (HOST, WHOLE_HOST, INTERPRETED, CUDA_PTX, TRITON_PTX)
BACKENDS = (*NATIVE, *SIMULATED)


def available(candidates: Sequence[StepBackend]) -> list[StepBackend]:
    """Return those that can run here."""
    return [backend for backend in candidates if backend.obstacle is None]


def parameter(backend: StepBackend, *values: Any, name: str = "", marks: Sequence[Any] = ()) -> Any:
    """Return a parameter of a test: `values` and the backend, named and marked."""
    simulated = [pytest.mark.simulated] if backend.is_simulated else []
    label = f"{name}-{backend}" if name else str(backend)
    return pytest.param(*values, backend, id=label, marks=[*simulated, *marks])


def on(candidates: Sequence[StepBackend]) -> Any:
    """Return what gives a test the argument `backend`: each of `candidates` that can run here."""
    return pytest.mark.parametrize("backend", [parameter(each) for each in available(candidates)])
