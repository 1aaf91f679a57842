"""`czm_fused::step_`: the whole step as one operator, for compiled graphs."""

# torch is typed in part.
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from czm_fused.ops import backends
from czm_fused.ops.registry import lib
from czm_fused.ops.step.descriptors import (
    DeviceScalar,
    Hyperparameters,
    StepTensor,
    has_supported_strides,
)
from czm_fused.ops.step.plan import DevicePlan, copy_back, refuse_without_kernel
from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES, STATE_NAMES, STATES, StepFlag
from czm_fused.ops.step.tensors import (
    ListedStates,
    ParamState,
    StepInputs,
    check_grads,
    problem_of_state,
)

_PLANS: list[tuple[tuple[object, ...], DevicePlan]] = []
_MOST_PLANS = 16
# Dynamo guards parameters and state by identity alone, which a conversion of the model keeps.
_REMEDY = (
    "if the model was converted after its step was compiled, take one step without torch.compile, "
    "which fits the state, or call torch.compiler.reset()"
)

lib.define(
    "step_(Tensor(a!)[] params, Tensor(z!)[] grads, "
    + "".join(f"Tensor({chr(98 + n)}!)[] {state.name}s, " for n, state in enumerate(STATES))
    + "int[] flags, int[] group_indices, Tensor hyperparameters, str backend, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)


def state_lists(
    states: Sequence[dict[str, Any]], all_flags: Sequence[int]
) -> tuple[list[Tensor], ...]:
    """Return the state of all tensors as the lists that `czm_fused::step_` takes."""
    return tuple(
        [states[owner][spec.name] for owner in owners]
        for spec, owners in zip(STATES, _find_owners(all_flags), strict=True)
    )


@torch.no_grad()
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    *arguments: Any,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if not params:
        return
    lists: tuple[list[Tensor], ...] = arguments[: len(STATES)]
    flags, group_indices, hyperparameters, backend, *scales = arguments[len(STATES) :]
    if scales:
        grad_scale, found_inf = (*scales, found_inf)[:2]
    _check_length("grads", grads, len(params))
    _check_length("flags", flags, len(params))
    _check_length("group_indices", group_indices, len(params))
    rows = _hyperparameters(hyperparameters)
    for index in set(group_indices):
        if not 0 <= index < len(rows):
            raise ValueError(f"group index {index} is not one of the {len(rows)} hyperparameters")
    places = _places(tuple(flags))
    for name, tensors, its_places in zip(STATE_NAMES, lists, places, strict=True):
        _check_length(f"{name}s", tensors, len(its_places))
    states = ListedStates(lists, places, len(params))
    plan, inputs = _plan(params, grads, states, flags, group_indices, backend)
    plan.run(inputs, rows, grad_scale, found_inf)
    if grad_scale is not None:
        copy_back(inputs.grads, grads)
    torch.autograd.graph.increment_version(itertools.chain(params, *lists))


def states_of(
    lists: Sequence[list[Tensor]], all_flags: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Return the state of each parameter, from lists as `state_lists` returns them."""
    states: list[dict[str, Tensor]] = [{} for _ in all_flags]
    for spec, tensors, owners in zip(STATES, lists, _find_owners(all_flags), strict=True):
        for owner, tensor in zip(owners, tensors, strict=True):
            states[owner][spec.name] = tensor
    return states


def _find_owners(all_flags: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the parameters that have each state."""
    return [
        [number for number, flags in enumerate(all_flags) if spec.belongs_to(flags)]
        for spec in STATES
    ]


@functools.lru_cache(maxsize=_MOST_PLANS)
def _places(all_flags: tuple[int, ...]) -> list[dict[int, int]]:
    """Return where `state_lists` has the state of each parameter, by its number."""
    return [
        {owner: place for place, owner in enumerate(owners)} for owners in _find_owners(all_flags)
    ]


def _plan(
    params: list[Tensor],
    grads: list[Tensor],
    states: ListedStates,
    flags: list[int],
    group_indices: list[int],
    backend: str,
) -> tuple[DevicePlan, StepInputs]:
    """Return a plan for these tensors, of an earlier call if one fits, and its inputs."""
    device = params[0].device
    chosen = backends.choose(device, backend)
    key = (device, chosen, flags, group_indices)
    for its_key, plan in tuple(_PLANS):
        if its_key == key:
            inputs = plan.read(params, grads, states)  # type: ignore[arg-type]
            if not isinstance(inputs, int):
                return plan, inputs
    tensors = [
        StepTensor.of(param, StepFlag(its_flags), index)
        for param, its_flags, index in zip(params, flags, group_indices, strict=True)
    ]
    _check_states(states, tensors, device)
    ordered = check_grads(params, grads)
    for number, (param, grad) in enumerate(zip(params, ordered, strict=True)):
        refuse_without_kernel(number, param, grad, chosen)
    plan = DevicePlan(tensors, device, chosen)
    inputs = plan.read(params, ordered, states)
    if isinstance(inputs, int):
        raise RuntimeError(
            f"parameter {inputs} of the step, its gradient or its state cannot be read: all must "
            f"be plain tensors on {device} with memory of their own"
        )
    _PLANS.insert(0, (key, plan))
    del _PLANS[_MOST_PLANS:]
    return plan, inputs


def _check_states(
    states: Sequence[ParamState], tensors: Sequence[StepTensor], device: torch.device
) -> None:
    for number, (state, tensor) in enumerate(zip(states, tensors, strict=True)):
        if tensor.flags & StepFlag.MASTER_WEIGHTS and tensor.dtype.itemsize != 2:
            raise ValueError(
                f"parameter {number} must be of 2 bytes an element, as it has a param_remainder, "
                f"but was {tensor.dtype}; {_REMEDY}"
            )
        # State like a parameter with gaps is dense; only the reference steps such parameters.
        is_dense = has_supported_strides(tensor.shape, tensor.strides, tensor.flags)
        for spec in STATES:
            if spec.belongs_to(tensor.flags):
                problem = problem_of_state(
                    state[spec.name], spec, tensor, device, by_address=is_dense
                )
                if problem is not None:
                    raise ValueError(
                        f"the {spec.name} of parameter {number} {problem}; {_REMEDY}"
                    )


def _check_length(name: str, values: Sequence[object], length: int) -> None:
    if len(values) != length:
        raise ValueError(f"{name} must have {length} elements, but has {len(values)}")


def _hyperparameters(tensor: Tensor) -> Hyperparameters:
    if tensor.dim() != 2 or tensor.shape[1] != len(HYPERPARAMETER_NAMES):
        raise ValueError(
            f"hyperparameters must have shape (groups, {len(HYPERPARAMETER_NAMES)}), but has "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device.type == "cpu":
        return Hyperparameters(tensor.tolist())
    return Hyperparameters([[DeviceScalar(x) for x in row] for row in tensor.to(torch.float32)])


lib.impl("step_", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("czm_fused::step_", lib=lib)
def _step_fake(*args: object, **kwargs: object) -> None:
    return None
