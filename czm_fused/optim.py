"""FusedCZMSGD: momentum SGD of exp-scaled filters with zero-mean gradients, in one fused step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from czm_fused import reference
from czm_fused.ops import backends
from czm_fused.ops.step import (
    HAS_MOMENTUM,
    IS_ANCHORED,
    IS_DAMPENED,
    IS_EXP_SCALED,
    IS_ZERO_MEAN,
    STATE_BITS,
    StepPlan,
    entries_from_lists,
)
from czm_fused.ops.table import (
    DTYPES,
    GROUP_COLUMNS,
    DeviceScalar,
    HyperParameters,
    hyper_parameter_row,
    same_memory_order,
    scalar,
)

HyperParameterRow = tuple[float | DeviceScalar, ...]

_FILTER_STATE = ("log_scale", "log_scale_momentum_buffer")


class FusedCZMSGD(Optimizer):
    """Momentum SGD that trains convolutions without BatchNorm, in one fused step.

    Every filter `W[f]` of a weight with three or more dimensions is `exp(g[f]) * V[f]`; the step
    updates `V` and `g` without `V` ever existing (paper §3.1), with zero-mean gradients (CZMG,
    §3.3) and unit-magnitude anchoring (LUMA, §3.4). For each filter, with `s = exp(g)`::

        n    = ‖W‖ / s
        dV   = s * dW + 2 * luma * (n - 1) / n * W / s
        dV  -= zmg * mean_over_taps(dV)
        dV  += weight_decay * W / s
        dg   = <dW, W>
        m    = momentum * m  + (1 - dampening) * dV
        mg   = momentum * mg + (1 - dampening) * dg
        g'   = g - lr * mg
        W'   = exp(g' - g) * W - lr * exp(g') * m

    Other tensors take plain momentum SGD. With `zmg=0, luma=0, exp_scale=False` it is
    `torch.optim.SGD` for all of them.

    Args:
        params: parameters, named parameters or group dictionaries, as `torch.optim` takes them;
            `czm_param_groups(model)` makes the groups that a network needs.
        lr: learning rate, a float or a 0-d tensor. Default 1e-3.
        momentum: momentum factor in [0, 1). Default 0.
        dampening: dampening of momentum in [0, 1]. Default 0.
        weight_decay: L2 penalty, acting on `V`, not on `g`. Default 0; LUMA replaces it.
        nesterov: Nesterov momentum; needs momentum and no dampening. Default False.
        zmg: the share of each gradient slice's spatial mean that is removed, in [0, 1]. 0 turns
            it off, 1 keeps filters on the isocline. Default 0.85.
        luma: strength of the pull of `‖V[f]‖` to 1. Default 5e-4.
        exp_scale: whether filters are exp-scaled. Default True.
        maximize: ascend instead of descend. Default False.
        backend: `"auto"`, `"cpu"`, `"cuda"`, `"triton"` or `"reference"`; `"auto"` obeys the
            environment variable `CZM_FUSED_BACKEND` and else takes the fastest that can run.
        fused: accepted for `torch.optim.SGD`'s sake; None or True.

    Every group can set `lr, momentum, dampening, weight_decay, nesterov, maximize, zmg, luma` and
    `exp_scale`. The rows of a 2-d weight are filters only in a group that itself sets `luma` or
    `exp_scale` (its key `min_filter_dim` is then 2, else 3).

    State of a parameter: `momentum_buffer`, of its shape, dtype and layout; for exp-scaled filters
    `log_scale` (`g`) and `log_scale_momentum_buffer`, `(out_channels,)`, float32 (float64 for
    float64 weights). `g` starts at `log ‖W[f]‖`, so that `V` has unit norm.

    Raises:
        ValueError: a hyper-parameter out of its range.
        TypeError: a parameter that is not real floating point.
        RuntimeError: a backend asked for by name that cannot run; a sparse gradient.
    """

    _step_supports_amp_scaling = True
    _plan: _OptimizerPlan | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        zmg: float = 0.85,
        luma: float = 5e-4,
        exp_scale: bool = True,
        maximize: bool = False,
        backend: str = "auto",
        fused: bool | None = None,
    ) -> None:
        if fused is False:
            raise ValueError("fused=False: FusedCZMSGD is fused; use backend='reference' instead")
        if backend not in ("auto", *backends.BACKENDS):
            raise ValueError(
                f"backend must be one of auto, {', '.join(backends.BACKENDS)}, but was {backend!r}"
            )
        self.backend = backend
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "zmg": zmg,
            "luma": luma,
            "exp_scale": exp_scale,
        }
        _check_hyper_parameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does, after checking it whole.

        Raises:
            ValueError: a hyper-parameter out of its range, or parameters on several devices.
            TypeError: a parameter that is not real floating point.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        names_filters = "luma" in param_group or "exp_scale" in param_group
        param_group.setdefault("min_filter_dim", 2 if names_filters else 3)
        _check_hyper_parameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            _check_params(self.param_groups[-1]["params"])
            for device in {p.device for p in self.param_groups[-1]["params"]}:
                backends.choose(device, self.backend)
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            group.setdefault("min_filter_dim", 3)
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of `torch.optim.SGD`, whatever backend wrote it.

        The log-scales keep their float32, momentum takes its parameter's dtype and layout, and
        hyper-parameters that the dictionary does not know keep their present values.
        """
        present = [dict(group) for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def keep(_: Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)

        def restore(optimizer: Optimizer) -> None:
            saved_groups = loaded["param_groups"]
            for group, saved, old in zip(
                optimizer.param_groups, saved_groups, present, strict=True
            ):
                for name in (*self.defaults, "min_filter_dim"):
                    if name not in saved and name in old:
                        group[name] = old[name]
                for number, param in zip(saved["params"], group["params"], strict=True):
                    _restore_state(
                        optimizer.state.get(param), loaded["state"].get(number, {}), param
                    )

        # torch casts all state to the parameter's dtype, and keeps the layout that was saved.
        handles = [
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self._plan = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in one fused step a device.

        Args:
            closure: evaluates the model again and returns the loss, or None.

        Raises:
            ValueError: a hyper-parameter that has left its range.
            RuntimeError: a sparse gradient, or one of another dtype or device than its parameter.
                Nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params: list[Tensor] = []
        grads: list[Tensor] = []
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    params.append(param)
                    grads.append(grad)

        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None

        if torch.compiler.is_compiling():
            self._compiled_step(params, grads, grad_scale, found_inf)
            return loss

        rows = [hyper_parameter_row(group) for group in self.param_groups]
        plan = self._plan
        if plan is None or not plan.still_describes(params, self.param_groups, self.state, rows):
            for group in self.param_groups:
                _check_hyper_parameters(group)
            plan = self._plan = _OptimizerPlan(self, params, rows)
        plan.run(grads, grad_scale, found_inf)
        torch.autograd.graph.increment_version(params)
        return loss

    def _compiled_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for number, param in enumerate(params):
            by_device.setdefault(param.device, []).append(number)
        hyper_parameters = torch.stack(
            [
                torch.stack(
                    [
                        torch.as_tensor(group[name], dtype=torch.float64)
                        for name in GROUP_COLUMNS
                    ]
                )
                for group in self.param_groups
            ]
        )
        lists = self._step_lists(params)
        for numbers in by_device.values():
            kinds = [lists["kinds"][number] for number in numbers]
            torch.ops.czm_fused.step_(
                [params[number] for number in numbers],
                [grads[number] for number in numbers],
                *_state_lists([self.state[params[number]] for number in numbers], kinds),
                kinds,
                [lists["groups"][number] for number in numbers],
                hyper_parameters,
                self.backend,
                grad_scale,
                found_inf,
            )

    def _step_lists(self, params: list[Tensor]) -> dict[str, list[int]]:
        """Create missing state; return each parameter's kind and the number of its group."""
        kinds: list[int] = []
        groups: list[int] = []
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None:
                    continue
                kind = _kind(param, group)
                _init_state(self.state[param], param, kind)
                kinds.append(kind)
                groups.append(number)
        return {"kinds": kinds, "groups": groups}


class _OptimizerPlan:
    """The step plans of one optimizer, one a device, and what must not have changed for them."""

    def __init__(
        self, optimizer: FusedCZMSGD, params: list[Tensor], rows: list[HyperParameterRow]
    ) -> None:
        lists = optimizer._step_lists(params)
        numbers_of: dict[torch.device, list[int]] = {}
        for number, param in enumerate(params):
            numbers_of.setdefault(param.device, []).append(number)
        self.plans: list[tuple[StepPlan, list[int]]] = []
        for device, numbers in numbers_of.items():
            kinds = [lists["kinds"][number] for number in numbers]
            entries = entries_from_lists(
                [params[number] for number in numbers],
                *_state_lists([optimizer.state[params[number]] for number in numbers], kinds),
                kinds,
                [lists["groups"][number] for number in numbers],
            )
            backend = backends.choose(device, optimizer.backend)
            self.plans.append((StepPlan(entries, backend), numbers))
        self.params = params
        self.filters = _filter_options(optimizer.param_groups)
        self.state_tensors = _state_tensors(optimizer.state)
        self._set_rows(rows)

    def still_describes(
        self,
        params: list[Tensor],
        param_groups: list[dict[str, Any]],
        state: Any,
        rows: list[HyperParameterRow],
    ) -> bool:
        if rows != self.rows:
            if len(rows) != len(self.rows) or _switches(rows) != _switches(self.rows):
                return False
            for row in rows:
                _check_hyper_parameters(dict(zip(GROUP_COLUMNS, row, strict=True)))
            self._set_rows(rows)
        tensors = _state_tensors(state)
        return (
            _filter_options(param_groups) == self.filters
            and len(tensors) == len(self.state_tensors)
            and all(map(operator.is_, tensors, self.state_tensors))
            and len(params) == len(self.params)
            and all(plan.still_describes(self._of(numbers, params)) for plan, numbers in self.plans)
        )

    def run(
        self, grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        # All devices' gradients are checked before anything is updated.
        ordered = [plan.in_memory_order(self._of(numbers, grads)) for plan, numbers in self.plans]
        for (plan, _), plan_grads in zip(self.plans, ordered, strict=True):
            plan.run(plan_grads, self.hyper_parameters, grad_scale, found_inf)

    def _of(self, numbers: list[int], tensors: list[Tensor]) -> list[Tensor]:
        if len(numbers) == len(tensors):
            return tensors
        return [tensors[number] for number in numbers]

    def _set_rows(self, rows: list[HyperParameterRow]) -> None:
        self.rows = rows
        self.hyper_parameters = HyperParameters(rows)


def _state_tensors(state: dict[Tensor, dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, state.values())))


_SWITCHES = tuple(
    GROUP_COLUMNS.index(name) for name in ("momentum", "dampening", "zmg", "luma")
)


def _switches(rows: Iterable[HyperParameterRow]) -> list[bool]:
    """What a plan depends on: which parts of the method are on."""
    return [row[column] != 0 for row in rows for column in _SWITCHES]


def _filter_options(param_groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a plan depends on beside the numbers: which tensors are filters, and of which group."""
    return [
        (group["exp_scale"], group["min_filter_dim"], len(group["params"]))
        for group in param_groups
    ]


def _kind(param: Tensor, group: dict[str, Any]) -> int:
    is_filter = param.dim() >= group["min_filter_dim"]
    has_momentum = bool(group["momentum"] != 0)
    kind = HAS_MOMENTUM if has_momentum else 0
    if is_filter and group["exp_scale"]:
        kind |= IS_EXP_SCALED
    if is_filter and group["zmg"] != 0:
        kind |= IS_ZERO_MEAN
    if is_filter and group["luma"] != 0:
        kind |= IS_ANCHORED
    if has_momentum and group["dampening"] != 0:
        kind |= IS_DAMPENED
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
            state["log_scale"] = reference.initial_log_scale(param.detach())
        if kind & HAS_MOMENTUM and "log_scale_momentum_buffer" not in state:
            state["log_scale_momentum_buffer"] = torch.zeros_like(state["log_scale"], dtype=real)
    for name, bits in STATE_BITS.items():
        if kind & bits != bits:
            continue
        if name == "momentum_buffer":
            state[name] = _like_param(name, state[name], param)
        else:
            dtype = torch.float32 if name == "step" else real
            state[name] = state[name].to(device=param.device, dtype=dtype).contiguous()


def _like_param(name: str, tensor: Tensor, param: Tensor) -> Tensor:
    if tensor.shape != param.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but its parameter {tuple(param.shape)}; "
            f"delete it from the optimizer's state to begin anew"
        )
    if (
        tensor.dtype == param.dtype
        and tensor.device == param.device
        and same_memory_order(tensor, param)
    ):
        return tensor
    return torch.empty_like(param).copy_(tensor)


def _state_lists(
    states: list[dict[str, Any]], kinds: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gather state in the order of `czm_fused::step_`'s lists."""
    momentum, log_scales, log_scale_momentum, steps = (
        [state[name] for state, kind in zip(states, kinds, strict=True) if kind & bits == bits]
        for name, bits in STATE_BITS.items()
    )
    return momentum, log_scales, log_scale_momentum, steps


def _restore_state(
    state: dict[str, Any] | None, saved: dict[str, Any], param: Tensor
) -> None:
    """Undo the cast of the log-scales to the parameter's dtype, and the saved momentum's layout."""
    if state is None:
        return
    buffer = state.get("momentum_buffer")
    if buffer is None:
        state.pop("momentum_buffer", None)
    elif buffer.shape == param.shape:
        state["momentum_buffer"] = _like_param("momentum_buffer", buffer, param)
    for name in _FILTER_STATE:
        if isinstance(saved.get(name), Tensor):
            state[name] = saved[name].to(
                device=param.device, dtype=reference.compute_dtype(param.dtype)
            )


def _check_params(params: list[Tensor]) -> None:
    for number, param in enumerate(params):
        if param.dtype not in DTYPES:
            raise TypeError(
                f"parameter {number} is {param.dtype}; FusedCZMSGD takes "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )
        if param.layout != torch.strided:
            raise TypeError(f"parameter {number} is {param.layout}; FusedCZMSGD takes dense ones")
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(
            f"a parameter group must be on one device, but has {', '.join(devices)}; "
            "make one group for each"
        )


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "dampening": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "zmg": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "luma": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
}


def _check_hyper_parameters(group: dict[str, Any]) -> None:
    for name, (is_valid, wanted) in _RANGES.items():
        value = group[name]
        if not isinstance(value, DeviceScalar):
            value = scalar(name, value, device=None)
        # What lives on the device is not waited for.
        if isinstance(value, DeviceScalar) or is_valid(value):
            continue
        raise ValueError(f"{name} must be {wanted}, but was {value}")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, but momentum was "
            f"{group['momentum']} and dampening {group['dampening']}"
        )
