"""What a step needs of an optimizer's groups and state, gathered once and kept while it holds."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from czm_fused import reference, sharding
from czm_fused.ops import backends
from czm_fused.ops.step import (
    HAS_MOMENTUM,
    HAS_REMAINDER,
    IS_ANCHORED,
    IS_DAMPENED,
    IS_EXP_SCALED,
    IS_ZERO_MEAN,
    STATE_BITS,
    StepPlan,
    entries_from_lists,
)
from czm_fused.ops.table import (
    GROUP_COLUMNS,
    DeviceScalar,
    HyperParameters,
    is_channels_last,
    is_dense,
    same_memory_order,
    scalar,
)

_log = logging.getLogger("czm_fused")

HyperParameterRow = tuple[float | DeviceScalar, ...]


class OptimizerPlan:
    """The step plans of one optimizer, one a device, and what must not have changed for them.

    Args:
        param_groups: the optimizer's groups.
        state: the optimizer's state; what is missing for a step is created.
        params: the parameters that have a gradient, in the order of the groups.
        rows: the hyper-parameters of the groups.
        backend: as the optimizer was asked for it.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        params: list[Tensor],
        rows: list[HyperParameterRow],
        backend: str,
    ) -> None:
        kinds, groups = kinds_and_groups(param_groups, state)
        self._plans: list[tuple[StepPlan, list[int]]] = []
        for (device, its_backend), numbers in split_by_device(params, kinds, backend).items():
            if its_backend != backend:
                _log_gaps()
            its_kinds = [kinds[number] for number in numbers]
            entries = entries_from_lists(
                [sharding.local(params[number]) for number in numbers],
                *state_lists([state[params[number]] for number in numbers], its_kinds),
                its_kinds,
                [groups[number] for number in numbers],
            )
            plan = StepPlan(entries, backends.choose(device, its_backend))
            self._plans.append((plan, numbers))
        self._count = len(params)
        self._sharded = params if any(map(sharding.is_dtensor, params)) else None
        self._backend = backend
        self._filters = _filter_options(param_groups)
        self._state = [dict(values) for values in state.values()]
        # Two tensors of one element compare, and may be equal: these are told apart by identity.
        self._single = [
            (number, name, value)
            for number, values in enumerate(self._state)
            for name, value in values.items()
            if isinstance(value, Tensor) and value.numel() == 1
        ]
        self._set_rows(rows)

    def still_describes(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor],
        rows: list[HyperParameterRow],
        backend: str,
    ) -> bool:
        """Whether a step of these would be planned alike; takes over new values of `rows`.

        Raises:
            ValueError: a hyper-parameter that has left its range.
        """
        if rows != self._rows:
            if len(rows) != len(self._rows) or _switches(rows) != _switches(self._rows):
                return False
            for row in rows:
                check_hyper_parameters(dict(zip(GROUP_COLUMNS, row, strict=True)))
            self._set_rows(rows)
        if self._sharded is not None:
            params = list(map(sharding.local, params))
            grads = list(map(sharding.local, grads))
        return (
            len(params) == self._count
            and backend == self._backend
            and _filter_options(param_groups) == self._filters
            and self._has_state(state)
            and all(
                plan.still_describes(self._of(numbers, params), self._of(numbers, grads))
                for plan, numbers in self._plans
            )
        )

    def run(
        self, grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Update everything in place; all devices' gradients are checked before anything is."""
        if self._sharded is not None:
            grads = sharding.local_grads(self._sharded, grads)
        ordered = [plan.in_memory_order(self._of(numbers, grads)) for plan, numbers in self._plans]
        for (plan, _), plan_grads in zip(self._plans, ordered, strict=True):
            plan.run(plan_grads, self._hyper_parameters, grad_scale, found_inf)
        if self._sharded is not None:
            torch.autograd.graph.increment_version([sharding.local(p) for p in self._sharded])

    def _has_state(self, state: dict[Tensor, dict[str, Any]]) -> bool:
        present = list(state.values())
        if self._sharded is not None:
            # Ranks must not ask one another whether two DTensors are equal.
            return _identities(present) == _identities(self._state)
        try:
            # Identical tensors are not compared; others cannot be told equal, and raise.
            if present != self._state:
                return False
        except RuntimeError:
            return False
        return all(present[number][name] is value for number, name, value in self._single)

    def _of(self, numbers: list[int], tensors: list[Tensor]) -> list[Tensor]:
        if len(numbers) == len(tensors):
            return tensors
        return [tensors[number] for number in numbers]

    def _set_rows(self, rows: list[HyperParameterRow]) -> None:
        self._rows = rows
        self._hyper_parameters = HyperParameters(rows)


def _identities(states: Iterable[dict[str, Any]]) -> list[dict[str, int]]:
    return [{name: id(value) for name, value in values.items()} for values in states]


def split_by_device(
    params: list[Tensor], kinds: list[int], backend: str
) -> dict[tuple[torch.device, str], list[int]]:
    """Return which parameters a device steps at once, and by what backend.

    It is the backend asked for, but `auto` leaves memory that no kernel walks to the reference.
    """
    chosen = os.environ.get(backends.ENVIRONMENT_VARIABLE, "auto") if backend == "auto" else backend
    numbers: dict[tuple[torch.device, str], list[int]] = {}
    for number, (param, kind) in enumerate(zip(params, kinds, strict=True)):
        part = sharding.local(param)
        walkable = part.is_contiguous() or (
            is_channels_last(part) if has_filters(kind) else is_dense(part)
        )
        its_backend = "reference" if chosen == "auto" and not walkable else backend
        numbers.setdefault((param.device, its_backend), []).append(number)
    return numbers


@functools.cache
def _log_gaps() -> None:
    _log.warning(
        "parameters that do not fill their memory, as slices do, are stepped by the backend "
        "reference, one by one; make them contiguous to have them fused"
    )


def kinds_and_groups(
    param_groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Create missing state; return the kind and the group of each parameter with a gradient."""
    kinds: list[int] = []
    groups: list[int] = []
    for number, group in enumerate(param_groups):
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            kind = kind_of(param, group)
            sharding.check_placements(index, param, has_filters(kind))
            _init_state(state[param], param, kind)
            kinds.append(kind)
            groups.append(number)
    return kinds, groups


_SWITCHES = tuple(
    GROUP_COLUMNS.index(name) for name in ("momentum", "dampening", "zmg", "luma")
)


def _switches(rows: Iterable[HyperParameterRow]) -> list[bool]:
    """What a plan depends on: which parts of the method are on."""
    return [row[column] != 0 for row in rows for column in _SWITCHES]


def _filter_options(param_groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a plan depends on beside the numbers: which tensors are filters, and of which group."""
    return [
        (
            group["exp_scale"],
            group["min_filter_dim"],
            group["max_filter_dim"],
            group["master_weights"],
            len(group["params"]),
        )
        for group in param_groups
    ]


def _is_on(value: float | Tensor) -> bool:
    """Whether a part of the method may act; what lives on a device may be turned on there."""
    return _is_on_device(value) or bool(value != 0)


def _is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def has_filters(kind: int) -> bool:
    """Whether a tensor of this kind is stepped filter by filter."""
    return kind & (IS_EXP_SCALED | IS_ZERO_MEAN | IS_ANCHORED) != 0


def kind_of(param: Tensor, group: dict[str, Any]) -> int:
    """Return the bits of what `group` makes of one of its parameters."""
    most = group["max_filter_dim"]
    is_filter = param.dim() >= group["min_filter_dim"] and (most is None or param.dim() <= most)
    has_momentum = _is_on(group["momentum"])
    kind = HAS_MOMENTUM if has_momentum else 0
    if is_filter and group["exp_scale"]:
        kind |= IS_EXP_SCALED
    if is_filter and _is_on(group["zmg"]):
        kind |= IS_ZERO_MEAN
    if is_filter and _is_on(group["luma"]):
        kind |= IS_ANCHORED
    if has_momentum and _is_on(group["dampening"]):
        kind |= IS_DAMPENED
    if group["master_weights"] and param.dtype.itemsize == 2:
        kind |= HAS_REMAINDER
    return kind


def _init_state(state: dict[str, Any], param: Tensor, kind: int) -> None:
    """Create the state that is missing, and fit what is there to a parameter that was converted."""
    real = reference.compute_dtype(param.dtype)
    if kind & HAS_MOMENTUM and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if kind & IS_DAMPENED:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    if kind & IS_DAMPENED and "step" not in state:
        # Momentum without a count was loaded, or gathered before dampening was turned on.
        state["step"] = torch.ones((), dtype=torch.float32, device=param.device)
    if kind & IS_EXP_SCALED:
        if "log_scale" not in state:
            log_scale = reference.initial_log_scale(sharding.local(param).detach())
            state["log_scale"] = sharding.per_filter(log_scale, param)
        if kind & HAS_MOMENTUM and "log_scale_momentum_buffer" not in state:
            state["log_scale_momentum_buffer"] = torch.zeros_like(state["log_scale"], dtype=real)
    if not kind & HAS_REMAINDER:
        # It would be of other weights when it is wanted again.
        state.pop("param_remainder", None)
    elif "param_remainder" not in state:
        state["param_remainder"] = torch.zeros_like(
            param, dtype=torch.int16, memory_format=torch.preserve_format
        )
    for name, bits in STATE_BITS.items():
        if kind & bits != bits:
            continue
        if name == "momentum_buffer":
            state[name] = like_param(name, state[name], param, param.dtype)
        elif name == "param_remainder":
            state[name] = like_param(name, state[name], param, torch.int16)
        elif name == "step":
            # torch loads a count of steps that is a number, too.
            state[name] = torch.as_tensor(state[name], dtype=torch.float32, device=param.device)
        else:
            values = state[name].to(device=param.device, dtype=real).contiguous()
            state[name] = sharding.place_like(name, values, param)


def like_param(name: str, tensor: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return state `name` as `dtype`, where its parameter is and laid out as it."""
    if tensor.shape != param.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but its parameter {tuple(param.shape)}; "
            f"delete it from the optimizer's state to begin anew"
        )
    tensor = sharding.place_like(name, tensor, param)
    if (
        tensor.dtype == dtype
        and tensor.device == param.device
        and same_memory_order(sharding.local(tensor), sharding.local(param))
    ):
        return tensor
    return torch.empty_like(param, dtype=dtype).copy_(tensor)


def state_lists(
    states: list[dict[str, Any]], kinds: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gather state, this rank's part of it, in the order of `czm_fused::step_`'s lists."""
    momentum, log_scales, log_scale_momentum, steps, remainders = (
        [
            sharding.local(state[name])
            for state, kind in zip(states, kinds, strict=True)
            if kind & bits == bits
        ]
        for name, bits in STATE_BITS.items()
    )
    return momentum, log_scales, log_scale_momentum, steps, remainders


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "dampening": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "zmg": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "luma": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
}


def check_hyper_parameters(group: dict[str, Any]) -> None:
    for name, (is_valid, wanted) in _RANGES.items():
        value = group[name]
        # What lives on the device is not waited for.
        if isinstance(value, DeviceScalar) or _is_on_device(value):
            continue
        number = scalar(name, value, device=None)
        if isinstance(number, DeviceScalar) or not is_valid(number):
            raise ValueError(f"{name} must be {wanted}, but was {value}")
    if group["nesterov"] and not (_is_on(group["momentum"]) and group["dampening"] == 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, but momentum was "
            f"{group['momentum']} and dampening {group['dampening']}"
        )
