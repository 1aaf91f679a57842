"""The plan of a step: everything about it that layouts decide, and no address of any tensor."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from czm_fused._internal import sharding
from czm_fused.ops import backends
from czm_fused.ops.step import state as step_state
from czm_fused.ops.step.descriptors import (
    Hyperparameters,
    StepTensor,
    build_descriptors,
    has_supported_strides,
)
from czm_fused.ops.step.reference import ReferenceStep
from czm_fused.ops.step.spec import STATES, StepFlag
from czm_fused.ops.step.tensors import (
    ParamState,
    StepInputs,
    TensorReader,
    check_grads,
    is_readable,
    problem_of_param,
    problem_of_state,
)

_log = logging.getLogger("czm_fused")


class _Runner(Protocol):
    unscales_grads: bool  # by grad_scale, in place

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...


class DevicePlan:
    """The step of the tensors on one device, by one backend.

    Args:
        tensors: what is stepped; None for parameters that are not.
        device: where all of them are.
        backend: one of `backends.BACKENDS`.

    Raises:
        ValueError: a parameter with strides that the backend does not support.
    """

    def __init__(
        self, tensors: Sequence[StepTensor | None], device: torch.device, backend: str
    ) -> None:
        self.tensors = tensors
        self.device = device
        self._dampened = [
            index
            for index, tensor in enumerate(tensors)
            if tensor is not None and tensor.flags & StepFlag.DAMPENING
        ]
        self._reader: TensorReader | None = None
        if backend == "reference":
            self._run: _Runner = ReferenceStep(tensors)
        else:
            self._run, descriptors = make_runner(backend, tensors, device)
            self._reader = TensorReader(tensors, descriptors, device)

    def read(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: Sequence[ParamState | None],
    ) -> StepInputs | int:
        """Return the inputs of a step, or the index of a parameter that is not as planned."""
        if self._reader is None:
            wrong = self._first_unplanned(params, grads, states)
            if wrong is not None:
                return wrong
            is_complete = not any(grad is None for grad in grads)
            return StepInputs(params, grads, states, None, is_complete)
        return self._reader.read(params, grads, states)

    def run(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update every tensor that has a gradient in place.

        Args:
            inputs: what `read` returned.
            hyperparameters: of the groups that the tensors name.
            grad_scale: what the gradients are divided by, or None for 1.
            found_inf: nothing is updated where this is not 0.

        The gradients are left divided by `grad_scale`, as torch's fused optimizers leave them.
        """
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.device, torch.float32)
        if found_inf is not None:
            found_inf = found_inf.to(self.device, torch.float32)
        self._run(inputs, hyperparameters, grad_scale, found_inf)
        if grad_scale is not None:
            self._unscale(inputs, grad_scale, found_inf)
        steps = [
            inputs.states[index]["step"]  # type: ignore[index]
            for index in self._dampened
            if inputs.grads[index] is not None
        ]
        if steps:
            updated = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
            torch._foreach_add_(steps, updated)

    def _unscale(
        self, inputs: StepInputs, grad_scale: Tensor, found_inf: Tensor | None
    ) -> None:
        grads = [grad for grad in inputs.grads if grad is not None]
        if not grads:
            return
        if self._run.unscales_grads:
            torch.autograd.graph.increment_version(grads)
            return
        if found_inf is not None:
            grad_scale = torch.where(found_inf == 0, grad_scale, 1.0)
        torch._foreach_div_(grads, grad_scale)

    def _first_unplanned(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: Sequence[ParamState | None],
    ) -> int | None:
        for index, (tensor, param, grad, state) in enumerate(
            zip(self.tensors, params, grads, states, strict=True)
        ):
            if grad is None:
                continue
            # State follows the layout of its parameter, here too.
            if tensor is None or param.stride() != tensor.strides:
                return index
            if problem_of_param(param, tensor, self.device, by_address=False) is not None:
                return index
            planned = tensor
            if grad.dtype != tensor.dtype and grad.is_floating_point():
                planned = replace(tensor, dtype=grad.dtype)
            if problem_of_param(grad, planned, self.device, by_address=False) is not None:
                return index
            # State like a parameter with gaps is dense.
            is_dense = has_supported_strides(tensor.shape, tensor.strides, tensor.flags)
            if any(
                problem_of_state(
                    (state or {}).get(spec.name), spec, tensor, self.device, by_address=is_dense
                )
                for spec in STATES
                if spec.belongs_to(tensor.flags)
            ):
                return index
        return None


def make_runner(
    backend: str, tensors: Sequence[StepTensor | None], device: torch.device
) -> tuple[_Runner, Any]:
    """Return what runs a native backend, and the descriptors of its tensors."""
    if backend == "cuda":
        from czm_fused.ops.step.cuda import CudaStep

        cuda_step = CudaStep(tensors, device)
        return cuda_step, cuda_step.descriptors
    if backend == "triton":
        from czm_fused.ops.step.triton import TritonStep

        triton_step = TritonStep(tensors, device)
        return triton_step, triton_step.descriptors
    from czm_fused.ops.step.cpu import BLOCK_NUMEL, CpuStep

    descriptors, work = build_descriptors(tensors, BLOCK_NUMEL)
    return CpuStep(work), descriptors


class StepPlan:
    """The step of an optimizer: the plan of each of its devices and backends.

    Args:
        param_groups: the optimizer's groups.
        state: the optimizer's state; what is missing for a step is created.
        params: the parameters of all groups, in their order.
        grads: their gradients, or None.
        backend: as the optimizer was asked for it.

    Attributes:
        has_masters: of each group, whether it has master weights.

    Raises:
        ValueError: a parameter or state that cannot be stepped as asked.
        RuntimeError: a gradient that cannot.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        backend: str,
    ) -> None:
        self.has_masters = [group["master_weights"] for group in param_groups]
        self._is_sharded = any(map(sharding.is_special, params))
        self._parts: list[tuple[list[int], DevicePlan]] = []
        groups = [
            (index, group) for index, group in enumerate(param_groups) for _ in group["params"]
        ]
        all_flags = [
            step_state.flags_of(param, group)
            for param, (_, group) in zip(params, groups, strict=True)
        ]
        ours, our_grads = self._local(params, grads)
        # Before any state is created.
        check_grads(ours, our_grads)
        tensors: list[StepTensor | None] = []
        for number, (param, grad, flags, (index, _)) in enumerate(
            zip(params, our_grads, all_flags, groups, strict=True)
        ):
            if is_lazy(param):
                tensors.append(None)
                continue
            tensor = StepTensor.of(ours[number], flags, index)
            if not flags & StepFlag.MASTER_WEIGHTS:
                # Also without a gradient, as this plan may step it when it has one.
                state.get(param, {}).pop("param_remainder", None)
            if grad is not None:
                step_state.prepare(number, param, flags, state[param])
            elif not _has_all_state(state.get(param), tensor):
                # It never had a gradient: its state is created with the first.
                tensors.append(None)
                continue
            tensors.append(tensor)
        for (device, its_backend), numbers in split(ours, our_grads, tensors, backend).items():
            if its_backend == "reference" != backend:
                _warn_fallback()
            plan = DevicePlan(
                [tensors[number] for number in numbers],
                device,
                backends.choose(device, its_backend),
            )
            self._parts.append((numbers, plan))

    def read(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: list[ParamState | None],
        *,
        reorders: bool = False,
    ) -> list[StepInputs] | None:
        """Return the inputs of a step, one for each device; or None if they are not as planned.

        Args:
            params: the parameters of all groups, in their order.
            grads: their gradients, or None.
            states: their states, or None.
            reorders: copy gradients that have another layout than their parameters.
        """
        if self._is_sharded:
            params, grads = self._local(params, grads)
            states = [_local_state(state) for state in states]
        if reorders:
            grads = check_grads(params, grads)
        if len(self._parts) == 1:
            # One device has all parameters, in their order.
            inputs = self._parts[0][1].read(params, grads, states)
            return None if isinstance(inputs, int) else [inputs]
        all_inputs = []
        for numbers, plan in self._parts:
            inputs = plan.read(
                select(numbers, params), select(numbers, grads), select(numbers, states)
            )
            if isinstance(inputs, int):
                return None
            all_inputs.append(inputs)
        return all_inputs

    def run(
        self,
        all_inputs: list[StepInputs],
        grads: Sequence[Tensor | None],
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update everything in place, `grads` among it where they are to be unscaled."""
        for (numbers, plan), inputs in zip(self._parts, all_inputs, strict=True):
            plan.run(inputs, hyperparameters, grad_scale, found_inf)
            if grad_scale is not None and not self._is_sharded:
                copy_back(inputs.grads, [grads[number] for number in numbers])
        if self._is_sharded:
            torch.autograd.graph.increment_version(
                [
                    param
                    for inputs in all_inputs
                    for param, grad in zip(inputs.params, inputs.grads, strict=True)
                    if grad is not None
                ]
            )

    def _local(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        if not self._is_sharded:
            return list(params), list(grads)
        return list(map(sharding.local, params)), sharding.local_grads(params, grads)


def copy_back(used: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Copy gradients to those that they are ordered copies of."""
    for copy, grad in zip(used, grads, strict=True):
        if grad is not None and copy is not None and copy is not grad:
            grad.copy_(copy)


def _local_state(state: ParamState | None) -> ParamState | None:
    if state is None:
        return None
    return {
        name: sharding.local(value) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _has_all_state(state: ParamState | None, tensor: StepTensor) -> bool:
    return all(
        isinstance((state or {}).get(spec.name), Tensor)
        for spec in STATES
        if spec.belongs_to(tensor.flags)
    )


def select(numbers: Sequence[int], items: list[Any]) -> list[Any]:
    """Return the items of these numbers."""
    return [items[number] for number in numbers]


def split(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    tensors: Sequence[StepTensor | None],
    backend: str,
) -> dict[tuple[torch.device, str], list[int]]:
    """Return which parameters a device steps at once, and by which backend.

    The backend is the one asked for, but `auto` leaves layouts that no kernel supports, parameters
    with a negative bit, and gradients of another dtype than their parameters to the reference.
    """
    chosen = os.environ.get(backends.ENVIRONMENT_VARIABLE, "auto") if backend == "auto" else backend
    numbers: dict[tuple[torch.device, str], list[int]] = {}
    for number, (param, grad, tensor) in enumerate(zip(params, grads, tensors, strict=True)):
        its_backend = backend
        if tensor is not None and not _has_kernel(param, grad, tensor):
            if chosen == "auto":
                its_backend = "reference"
            else:
                refuse_without_kernel(number, param, grad, chosen)
        numbers.setdefault((param.device, its_backend), []).append(number)
    return numbers


def refuse_without_kernel(number: int, param: Tensor, grad: Tensor | None, backend: str) -> None:
    """Refuse what the backend's kernel does not step; strides are refused where its plan is made.

    Raises:
        RuntimeError: the gradient of parameter `number` is of another dtype.
        ValueError: the parameter has a negative bit.
    """
    if backend == "reference":
        return
    if grad is not None and grad.dtype != param.dtype:
        raise RuntimeError(
            f"the gradient of parameter {number} is {grad.dtype}, but the parameter {param.dtype}, "
            f"which backend={backend!r} does not step; convert the gradient, or use backend='auto'"
        )
    if not is_readable(param):
        raise ValueError(
            f"parameter {number} has a negative bit, which backend={backend!r} does not read; set "
            "it to param.resolve_neg(), or use backend='reference'"
        )


def _has_kernel(param: Tensor, grad: Tensor | None, tensor: StepTensor) -> bool:
    has_its_dtype = grad is None or grad.dtype == param.dtype
    is_supported = has_supported_strides(tensor.shape, tensor.strides, tensor.flags)
    return is_supported and has_its_dtype and is_readable(param)


@functools.cache
def _warn_fallback() -> None:
    _log.warning(
        "Non-dense parameters (for example slices of a larger tensor), and gradients of another "
        "dtype than their parameters, fall back to backend='reference'; call .contiguous() on the "
        "first, and convert the second."
    )
