"""The state of a parameter: which parts of the method act on it, and what they keep."""

# torch is typed in part.
# mypy: no-warn-return-any

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from czm_fused._internal import sharding
from czm_fused.ops.step.descriptors import scalar
from czm_fused.ops.step.reference import initial_log_scale
from czm_fused.ops.step.spec import (
    FILTER_FLAGS,
    HYPERPARAMETERS,
    STATES,
    Shape,
    State,
    StepFlag,
    state_dtype,
)
from czm_fused.ops.step.tensors import has_memory, is_readable, matching_strides

# Of an embedding; kernels of one dimension are shorter, most often.
_LEAST_WIDTH = 16
_OPTION_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("exp_scale", (bool, int), "True or False"),
    ("master_weights", (bool, int), "True or False"),
    ("capturable", (bool, int), "True or False"),
    ("min_filter_dim", (int,), "a number of dimensions"),
    ("max_filter_dim", (int, type(None)), "a number of dimensions or None"),
)


def is_on_device(value: object) -> bool:
    """Return True for a tensor that the host would have to wait for."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def is_on(value: Any) -> bool:
    """Return True if a part of the method may act; a device scalar may turn it on at any time."""
    return is_on_device(value) or bool(value != 0)


def flags_of(param: Tensor, group: dict[str, Any]) -> StepFlag:
    """Return the parts of the method that act on a parameter of `group`."""
    flags = StepFlag(0)
    if is_lazy(param):
        return flags
    most = group["max_filter_dim"]
    is_filter = param.dim() >= group["min_filter_dim"] and (most is None or param.dim() <= most)
    if group["min_filter_dim"] > 2:
        is_filter = is_filter and not is_no_filter(param.shape)
    for hyperparameter in HYPERPARAMETERS:
        flag = hyperparameter.flag
        if flag is not None and is_on(group[hyperparameter.name]):
            flags |= flag
    if not is_filter:
        flags &= ~FILTER_FLAGS
    elif group["exp_scale"]:
        flags |= StepFlag.EXP_SCALE
    if not flags & StepFlag.MOMENTUM:
        flags &= ~StepFlag.DAMPENING
    if group["master_weights"] and param.dtype.itemsize == 2:
        flags |= StepFlag.MASTER_WEIGHTS
    return flags


def is_no_filter(shape: Sequence[int]) -> bool:
    """Return True for three or more dimensions that tell that a tensor is no convolution's weight.

    Embeddings of positions and class tokens are (1, positions, width), and no kernel with a filter
    alone is as long as a width; scales of channels are (channels, 1, 1).
    """
    is_embedding = len(shape) == 3 and shape[0] == 1 and shape[2] >= _LEAST_WIDTH
    return is_embedding or math.prod(shape[1:]) == 1


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Check that every hyperparameter of `group` is in its range.

    Raises:
        ValueError: one is not; the message names it.
    """
    for hyperparameter in HYPERPARAMETERS:
        name, value = hyperparameter.name, group[hyperparameter.name]
        # The host does not wait for a device scalar.
        if is_on_device(value):
            continue
        if not hyperparameter.is_valid(scalar(name, value, device=None)):  # type: ignore[arg-type]
            raise ValueError(f"{name} must be {hyperparameter.range}, but was {value}")
    for name, kinds, what in _OPTION_TYPES:
        if name in group and not isinstance(group[name], kinds):
            raise ValueError(f"{name} must be {what}, but was {group[name]!r}")
    if group["nesterov"] and not (is_on(group["momentum"]) and group["dampening"] == 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, but momentum was "
            f"{group['momentum']} and dampening {group['dampening']}"
        )


def prepare(number: int, param: Tensor, flags: StepFlag, state: dict[str, Any]) -> None:
    """Check that a step can take parameter `number`, and create the state that is missing.

    Raises:
        TypeError: a parameter that a wrapper has flattened.
        ValueError: one that is placed otherwise than its filters allow, or has no memory; a state
            that cannot be fitted to it.
    """
    sharding.check_not_flattened(number, param)
    sharding.check_placements(number, param, bool(flags & FILTER_FLAGS))
    check_is_real(number, param, flags)
    ours = sharding.local(param)
    if not has_memory(ours):
        raise ValueError(
            f"parameter {number} has no memory: its storage was resized to "
            f"{ours.untyped_storage().nbytes()} bytes; restore it before the step"
        )
    init_state(state, param, flags)


def check_is_real(number: int, param: Tensor, flags: StepFlag) -> None:
    """Check that parameter `number` is real if it has filters.

    Raises:
        TypeError: it is complex.
    """
    if param.is_complex() and flags & FILTER_FLAGS:
        raise TypeError(
            f"parameter {number} is {param.dtype}, but filters must be real; set exp_scale=False, "
            "zmg=0, luma=0 and grad_norm=0 in its group"
        )
    if param.is_conj():
        raise TypeError(
            f"parameter {number} has a conjugate bit, which no step follows; set it to "
            "param.resolve_conj()"
        )


def init_state(state: dict[str, Any], param: Tensor, flags: StepFlag) -> None:
    """Create the state that is missing, and fit what is there to a parameter that was converted.

    Raises:
        ValueError: a state that cannot be fitted to its parameter.
    """
    began_without_count = state.get("momentum_buffer") is not None
    for spec in STATES:
        if not spec.belongs_to(flags):
            if spec.flags == StepFlag.MASTER_WEIGHTS:
                # It would belong to other weights when it is wanted again.
                state.pop(spec.name, None)
        elif state.get(spec.name) is None:
            state[spec.name] = _new_state(spec, state, param, began_without_count)
        else:
            state[spec.name] = fit_state(spec, state[spec.name], param)


def _new_state(
    spec: State, state: dict[str, Any], param: Tensor, began_without_count: bool
) -> Tensor:
    dtype = state_dtype(spec, param.dtype)
    if spec.name == "log_scale":
        return sharding.per_filter(initial_log_scale(sharding.local(param).detach()), param)
    if spec.name == "step":
        # Momentum without a count was loaded, or gathered before dampening was turned on.
        return torch.full((), float(began_without_count), dtype=dtype, device=param.device)
    like = state["log_scale"] if spec.shape is Shape.FILTERS else param
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def fit_state(spec: State, value: Any, param: Tensor) -> Tensor:
    """Return state `value` in the dtype, on the device and in the layout that `param` needs.

    Raises:
        ValueError: it is not a tensor, has no memory, or has another shape.
    """
    if spec.shape is Shape.SCALAR and not isinstance(value, Tensor):
        # torch loads a count of steps that is a number, too.
        value = torch.tensor(value, dtype=torch.float32, device=param.device)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{spec.name} must be a tensor, but was {type(value).__name__}; delete it from the "
            "optimizer's state to begin anew"
        )
    shapes = {Shape.PARAM: param.shape, Shape.FILTERS: param.shape[:1], Shape.SCALAR: ()}
    shape = tuple(shapes[spec.shape])
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{spec.name} must have shape {shape} for a parameter of shape {tuple(param.shape)}, "
            f"but has {tuple(value.shape)}; delete it from the optimizer's state to begin anew"
        )
    dtype = state_dtype(spec, param.dtype)
    if spec.shape is not Shape.SCALAR:
        value = sharding.place_like(spec.name, value, param)
    ours = sharding.local(value)
    if not has_memory(ours):
        raise ValueError(
            f"{spec.name} has no memory: its storage was resized to "
            f"{ours.untyped_storage().nbytes()} bytes; restore it before the step"
        )
    # Its own layout is checked against the parameter's, or (out_channels,) against contiguous.
    like = sharding.local(param) if spec.shape is Shape.PARAM else ours.contiguous()
    if (
        value.dtype == dtype
        and value.device == param.device
        and is_readable(value)
        and matching_strides(ours.shape, ours.stride(), like.stride())
    ):
        return value
    if spec.shape is Shape.PARAM:
        return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    return value.to(device=param.device, dtype=dtype).resolve_neg().contiguous()
