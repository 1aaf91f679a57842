"""FusedCZMSGD: momentum SGD of exp-scaled filters with zero-mean gradients, in one fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from czm_fused import reference, sharding
from czm_fused.ops import backends
from czm_fused.ops.table import DTYPES, GROUP_COLUMNS, hyper_parameter_row
from czm_fused.plan import (
    OptimizerPlan,
    check_hyper_parameters,
    has_filters,
    kind_of,
    kinds_and_groups,
    like_param,
    split_by_device,
    state_lists,
)

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
        master_weights: whether bfloat16 and float16 weights keep their float32 values: the step is
            taken with these and the parameter is their rounding, so that steps smaller than its
            precision add up. Costs 2 bytes a weight; other dtypes are not affected. Default False.
        capturable: whether the learning rate is kept as a float32 tensor on the parameters' device,
            which a CUDA graph reads at every replay and a compiled step without compiling anew;
            schedulers update it in place. Default False. Any hyper-parameter can be given as such.
        differentiable: accepted for `torch.optim.SGD`'s sake; False.
        foreach: accepted for `torch.optim.SGD`'s sake; None or False.
        fused: accepted for `torch.optim.SGD`'s sake; None or True.

    Parameters may be DTensors, as `fully_shard` makes them: split along dimension 0 or not at all
    where they are filters, anyhow else. Each rank steps its part, and nothing is communicated.

    Every group can set `lr, momentum, dampening, weight_decay, nesterov, maximize, zmg, luma,
    exp_scale, master_weights` and `capturable`. The rows of a 2-d weight are filters only in a
    group that itself sets `luma` or `exp_scale` (its key `min_filter_dim` is then 2, else 3;
    `max_filter_dim` bounds them above).
    A bare `model.parameters()` tells no transposed convolutions: their weights have three or more
    dimensions and count as filters, so use `czm_param_groups` where there are any.

    State of a parameter: `momentum_buffer`, of its shape, dtype and layout; for exp-scaled filters
    `log_scale` (`g`) and `log_scale_momentum_buffer`, `(out_channels,)`, float32 (float64 for
    float64 weights). `g` starts at `log ‖W[f]‖`, so that `V` has unit norm. With master weights,
    `param_remainder`, int16: what the float32 weight is beyond the parameter. A DTensor's state are
    DTensors of the whole shape, placed as it is.

    Raises:
        ValueError: a hyper-parameter out of its range; a DTensor that splits filters.
        TypeError: a parameter that is not real floating point.
        RuntimeError: a backend asked for by name that cannot run; a sparse gradient.
    """

    _step_supports_amp_scaling = True
    _plan: OptimizerPlan | None = None

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
        master_weights: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if fused is False:
            raise ValueError("fused=False: FusedCZMSGD is fused; use backend='reference' instead")
        if foreach:
            raise ValueError("foreach=True: FusedCZMSGD is fused, which is faster; leave it out")
        if differentiable:
            raise ValueError(
                "differentiable=True: FusedCZMSGD steps outside autograd; use exp_scale(conv) with "
                "torch.optim.SGD(..., differentiable=True)"
            )
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
            "master_weights": master_weights,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        check_hyper_parameters(defaults)
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
        param_group.setdefault("max_filter_dim", None)
        check_hyper_parameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            _check_params(self.param_groups[-1])
            for device in {p.device for p in self.param_groups[-1]["params"]}:
                backends.choose(device, self.backend)
        except Exception:
            self.param_groups.pop()
            raise
        _make_capturable(self.param_groups[-1])
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            group.setdefault("min_filter_dim", 3)
            group.setdefault("max_filter_dim", None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.setdefault("capturable", False)
            group.setdefault("master_weights", False)
            _make_capturable(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of `torch.optim.SGD`, whatever backend wrote it.

        The log-scales keep their float32, momentum takes its parameter's dtype and layout, and
        hyper-parameters that the dictionary does not know keep their present values.
        """
        present = [dict(group) for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def keep(_: Optimizer, final: dict[str, Any]) -> None:
            for group, saved in zip(self.param_groups, final["param_groups"], strict=False):
                for number, param in zip(saved["params"], group["params"], strict=False):
                    for name, value in final["state"].get(number, {}).items():
                        sharding.check_state(name, value, param)
            loaded.update(final)

        def restore(optimizer: Optimizer) -> None:
            saved_groups = loaded["param_groups"]
            for group, saved, old in zip(
                optimizer.param_groups, saved_groups, present, strict=True
            ):
                for name in (*self.defaults, "min_filter_dim", "max_filter_dim"):
                    if name not in saved and name in old:
                        group[name] = old[name]
                _make_capturable(group)
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
            RuntimeError: a sparse gradient, or one of another dtype, device or placement than its
                parameter. Nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        if type(None) in set(map(type, grads)):
            params = [param for param in params if param.grad is not None]
            grads = [param.grad for param in params]

        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None

        if torch.compiler.is_compiling():
            self._compiled_step(params, grads, grad_scale, found_inf)
            return loss

        rows = [hyper_parameter_row(group) for group in self.param_groups]
        plan = self._plan
        if plan is None or not plan.still_describes(
            self.param_groups, self.state, params, grads, rows, self.backend
        ):
            for group in self.param_groups:
                check_hyper_parameters(group)
            plan = self._plan = OptimizerPlan(
                self.param_groups, self.state, params, rows, self.backend
            )
        try:
            plan.run(grads, grad_scale, found_inf)
        except Exception:
            # What was refused must be looked at whole again.
            self._plan = None
            raise
        torch.autograd.graph.increment_version(params)
        return loss

    def _compiled_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        rows = [[group[name] for name in GROUP_COLUMNS] for group in self.param_groups]
        devices = [x.device for row in rows for x in row if isinstance(x, Tensor)]
        # Numbers join the tensors that must not be waited for.
        device = next((device for device in devices if device.type != "cpu"), None)
        hyper_parameters = torch.stack(
            [
                torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in row])
                for row in rows
            ]
        )
        all_kinds, groups = kinds_and_groups(self.param_groups, self.state)
        local_grads = sharding.local_grads(params, grads)
        by_device = split_by_device(params, all_kinds, self.backend)
        for (_, backend), numbers in by_device.items():
            kinds = [all_kinds[number] for number in numbers]
            torch.ops.czm_fused.step_(
                [sharding.local(params[number]) for number in numbers],
                [local_grads[number] for number in numbers],
                *state_lists([self.state[params[number]] for number in numbers], kinds),
                kinds,
                [groups[number] for number in numbers],
                hyper_parameters,
                backend,
                grad_scale,
                found_inf,
            )


def _make_capturable(group: dict[str, Any]) -> None:
    if group["capturable"] and group["params"]:
        device = group["params"][0].device
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            group["lr"] = torch.as_tensor(lr, dtype=torch.float32).to(device)


def _restore_state(
    state: dict[str, Any] | None, saved: dict[str, Any], param: Tensor
) -> None:
    """Undo the cast of all state to the parameter's dtype, and give it the parameter's layout."""
    if state is None:
        return
    buffer = state.get("momentum_buffer")
    if buffer is None:
        state.pop("momentum_buffer", None)
    elif buffer.shape == param.shape:
        state["momentum_buffer"] = like_param("momentum_buffer", buffer, param, param.dtype)
    remainder = saved.get("param_remainder")
    if isinstance(remainder, Tensor) and remainder.shape == param.shape:
        state["param_remainder"] = like_param("param_remainder", remainder, param, torch.int16)
    for name in _FILTER_STATE:
        if isinstance(saved.get(name), Tensor):
            values = saved[name].to(
                device=param.device, dtype=reference.compute_dtype(param.dtype)
            )
            state[name] = sharding.place_like(name, values, param)


def _check_params(group: dict[str, Any]) -> None:
    params: list[Tensor] = group["params"]
    for number, param in enumerate(params):
        if param.dtype not in DTYPES:
            raise TypeError(
                f"parameter {number} is {param.dtype}; FusedCZMSGD takes "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )
        if is_traceable_wrapper_subclass(sharding.local(param)):
            raise TypeError(
                f"parameter {number} is a {type(sharding.local(param)).__name__}; FusedCZMSGD "
                "takes plain tensors, and DTensors of them"
            )
        if param.layout != torch.strided:
            raise TypeError(f"parameter {number} is {param.layout}; FusedCZMSGD takes dense ones")
        sharding.check_placements(number, param, has_filters(kind_of(param, group)))
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(
            f"a parameter group must be on one device, but has {', '.join(devices)}; "
            "make one group for each"
        )
