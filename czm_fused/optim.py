"""FusedCZMSGD: momentum SGD of exp-scaled filters with zero-mean gradients, in one fused step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from czm_fused._internal import sharding
from czm_fused._internal.loading import match_state_dict, restore_state
from czm_fused._internal.parameters import (
    check_params,
    make_capturable,
    name_params,
    warn_of_shapes,
)
from czm_fused.ops import backends
from czm_fused.ops.step.descriptors import DeviceScalar, Hyperparameters, StepTensor, scalar
from czm_fused.ops.step.operator import state_lists, states_of
from czm_fused.ops.step.plan import StepPlan, select, split
from czm_fused.ops.step.spec import (
    HYPERPARAMETER_NAMES,
    HYPERPARAMETERS,
    OPTIONS,
    STATES,
    StepFlag,
)
from czm_fused.ops.step.state import check_hyperparameters, flags_of, prepare
from czm_fused.ops.step.tensors import ParamState, StepInputs, find_tensors

_params_of = operator.itemgetter("params")
_options_of = operator.itemgetter(*OPTIONS)
_hyperparameters_of = operator.itemgetter(*HYPERPARAMETER_NAMES)
_SWITCHES = [
    index for index, hyperparameter in enumerate(HYPERPARAMETERS) if hyperparameter.flag is not None
]
_MOST_PLANS = 8
_FILTER_DIMS = {"min_filter_dim": 3, "max_filter_dim": None}
_NEWER_THAN_SOME_PICKLES = {"capturable": False, "master_weights": False, "grad_norm": 0.0}


class FusedCZMSGD(Optimizer):
    """Momentum SGD that trains convolutions without BatchNorm, in one fused step.

    Every filter `W[f]` of a weight with three or more dimensions is `exp(g[f]) * V[f]`; the step
    updates `V` and `g` without `V` ever existing (paper §3.1), with zero-mean gradients (CZMG,
    §3.3) and unit-magnitude anchoring (LUMA, §3.4). For each filter, with `s = exp(g)`:

        dW  *= grad_norm / (‖W‖ * ‖dW‖)     unless grad_norm is 0
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
        momentum: momentum factor, a number >= 0. Default 0.
        dampening: dampening of momentum in [0, 1]. Default 0.
        weight_decay: L2 penalty, acting on `V`, not on `g`. Default 0; LUMA replaces it.
        nesterov: Nesterov momentum; needs momentum and no dampening. Default False.
        zmg: the share of each gradient slice's spatial mean that is removed, in [0, 1]. 0 turns
            it off, 1 keeps filters on the isocline. Default 0.85.
        luma: strength of the pull of `‖V[f]‖` to 1. Default 5e-4.
        grad_norm: the norm that the gradient by `W[f] / ‖W[f]‖` gets in every filter, so that all
            turn alike, as before a BatchNorm: by about `lr * grad_norm / ‖V[f]‖²` radians a step
            (Kosson et al., arXiv 2305.17212). 0 turns it off. Default 0.
        exp_scale: exp-scale the filters. Default True.
        maximize: ascend instead of descend. Default False.
        backend: `"auto"`, `"cpu"`, `"cuda"`, `"triton"` or `"reference"`; `"auto"` obeys the
            environment variable `CZM_FUSED_BACKEND` and else takes the fastest that can run.
        master_weights: keep the float32 weights of which bfloat16 and float16 parameters are the
            rounding, so that smaller steps add up. Costs 2 bytes a weight. Default False.
        capturable: keep the learning rate as a float32 tensor on the parameters' device,
            which a CUDA graph reads at every replay and a compiled step without compiling anew;
            schedulers update it in place. Default False. Any hyperparameter can be given as such.
        differentiable: accepted for `torch.optim.SGD`'s sake; False.
        foreach: accepted for `torch.optim.SGD`'s sake; None or False.
        fused: True makes the step divide by a GradScaler's scale, and skip what is not finite, on
            the device, as `torch.optim.SGD(fused=True)` does. None or False leave both to the
            GradScaler, so that Lightning can clip and Accelerate sees which steps were skipped.
            The step is fused in any case. Default None.

    Parameters may be DTensors, as `fully_shard` makes them: filters split along dimension 0 or not
    at all, others anyhow. Each rank steps its part, and communicates nothing but gradients that are
    placed otherwise than their parameters.

    Every group can set `lr, momentum, dampening, weight_decay, nesterov, maximize, zmg, luma,
    grad_norm, exp_scale, master_weights` and `capturable`. The rows of a 2-d weight are filters
    only in a group that itself sets `luma` or `exp_scale` (its key `min_filter_dim` is then 2, else
    3; `max_filter_dim` bounds them above).
    A bare `model.parameters()` has no modules to tell what is a filter: weights of transposed
    convolutions are treated as filters, tensors of shape (1, positions, width) and (channels, 1, 1)
    are not, and a warning names the shapes that may be either. `czm_param_groups` knows.

    State of a parameter: `momentum_buffer`, of its shape, dtype and layout; for exp-scaled filters
    `log_scale` (`g`) and `log_scale_momentum_buffer`, `(out_channels,)`, float32 (float64 for
    float64 weights). `g` starts at `log ‖W[f]‖`, so that `V` has unit norm. With master weights,
    `param_remainder`, int16: what the float32 weight is beyond the parameter. A DTensor's state are
    DTensors of the whole shape, placed as it is.

    Raises:
        ValueError: a hyperparameter out of its range; a DTensor that splits filters.
        TypeError: a parameter that is not floating point, or filters that are complex.
        RuntimeError: a backend asked for by name that cannot run; a sparse gradient.

    Warns:
        UserWarning: parameters that are treated as filters, as their shapes tell, and may be none.
    """

    # As torch.optim names it: a GradScaler hands its scale to `step` where this is True.
    _step_supports_amp_scaling: bool
    # What a plan depends on beside layouts, and the plan; no plan holds a tensor or an address.
    _plans: dict[tuple[Any, ...], StepPlan]
    _converted: _Converted | None = None
    _has_dtensors = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        zmg: float = 0.85,
        luma: float = 5e-4,
        grad_norm: float = 0.0,
        exp_scale: bool = True,
        maximize: bool = False,
        backend: Literal["auto", "cpu", "cuda", "triton", "reference"] = "auto",
        master_weights: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
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
        self._step_supports_amp_scaling = bool(fused)
        self._plans = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "zmg": zmg,
            "luma": luma,
            "grad_norm": grad_norm,
            "exp_scale": exp_scale,
            "master_weights": master_weights,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does, after checking it whole.

        The group becomes a copy of `param_group`, with tensors of its own for hyperparameters.
        Where the others have names and it has none, its parameters are named by their places.

        Raises:
            ValueError: a hyperparameter out of its range, or parameters on several devices.
            TypeError: a parameter that is not floating point, or filters that are complex.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        param_group = dict(param_group)
        is_bare = not {"luma", "zmg", "exp_scale", "min_filter_dim"} & param_group.keys()
        names_filters = "luma" in param_group or "exp_scale" in param_group
        param_group.setdefault("min_filter_dim", 2 if names_filters else 3)
        param_group.setdefault("max_filter_dim", None)
        check_hyperparameters({**self.defaults, **param_group})
        if self.param_groups and "param_names" in self.param_groups[0]:
            name_params(param_group, len(self.param_groups))
        super().add_param_group(param_group)
        try:
            check_params(self.param_groups[-1])
            for device in {p.device for p in self.param_groups[-1]["params"]}:
                backends.choose(device, self.backend)
        except Exception:
            self.param_groups.pop()
            raise
        group = self.param_groups[-1]
        for name in HYPERPARAMETER_NAMES:
            if isinstance(group[name], Tensor):
                group[name] = group[name].detach().clone()
        make_capturable(group)
        self._plans.clear()
        self._has_dtensors |= any(map(sharding.is_dtensor, group["params"]))
        if is_bare:
            warn_of_shapes(group)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "backend": self.backend,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        self._converted = None
        self.defaults = {**_NEWER_THAN_SOME_PICKLES, **self.defaults}
        for group in self.param_groups:
            self._has_dtensors |= any(map(sharding.is_dtensor, group["params"]))
            for name, value in {**_FILTER_DIMS, **self.defaults}.items():
                group.setdefault(name, value)
            make_capturable(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of `torch.optim.SGD`, whatever backend wrote it.

        The log-scales keep their float32, momentum takes its parameter's dtype and layout, and
        hyperparameters that the dictionary does not know keep their present values. Where both
        sides have names, state goes by them, and a group takes the options that its parameters were
        saved with, whatever the order of the groups; else both go by their places.

        Raises:
            ValueError: names that do not match, a group whose parameters were saved with different
                options, or a value of the wrong type, shape or range. Nothing is loaded then.
        """
        present = [dict(group) for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def match(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            loaded.update(match_state_dict(final, self.param_groups))
            return dict(loaded)

        def restore(optimizer: Optimizer) -> None:
            saved_groups = loaded["param_groups"]
            for group, saved, old in zip(
                optimizer.param_groups, saved_groups, present, strict=True
            ):
                for name in (*self.defaults, "min_filter_dim", "max_filter_dim"):
                    if name not in saved and name in old:
                        group[name] = old[name]
                make_capturable(group)
                for number, param in zip(saved["params"], group["params"], strict=True):
                    restore_state(
                        optimizer.state.get(param), loaded["state"].get(number, {}), param
                    )

        # torch casts all state to the parameter's dtype, and keeps the layout that was saved.
        handles = [
            self.register_load_state_dict_pre_hook(match),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in one fused step a device.

        Args:
            closure: evaluates the model again and returns the loss, or None.

        Raises:
            ValueError: a hyperparameter that has left its range.
            RuntimeError: a sparse gradient, or one of another shape, device or placement than its
                parameter. Nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None
        if torch.compiler.is_compiling():
            self._traced_step(grad_scale, found_inf)
            return loss
        params = list(chain.from_iterable(map(_params_of, self.param_groups)))
        if sharding.is_fake(params):
            self._traced_step(grad_scale, found_inf)
            return loss

        grads, states = find_tensors(params, self.state)
        if self._has_dtensors:
            # Once, as it may communicate, and a step may read the gradients again.
            grads = sharding.place_grads(params, grads)
        converted = self._converted
        values = list(chain.from_iterable(map(_hyperparameters_of, self.param_groups)))
        if converted is None or not converted.is_of(values):
            converted = self._converted = _Converted(self.param_groups, values, converted)
        plan, all_inputs = self._plan(params, grads, states, converted.switches)
        plan.run(all_inputs, grads, converted.hyperparameters, grad_scale, found_inf)
        if not all([inputs.is_complete for inputs in all_inputs]):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        torch.autograd.graph.increment_version(params)
        return loss

    def _plan(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: list[ParamState | None],
        switches: tuple[bool, ...],
    ) -> tuple[StepPlan, list[StepInputs]]:
        """Return a plan that fits these tensors, and what it has read of them."""
        key = (
            self.backend,
            switches,
            *map(_options_of, self.param_groups),
            *map(len, map(_params_of, self.param_groups)),
        )
        plan = self._plans.get(key)
        if plan is not None:
            all_inputs = plan.read(params, grads, states)
            if all_inputs is None:
                all_inputs = plan.read(params, grads, states, reorders=True)
            if all_inputs is not None:
                return plan, all_inputs
        plan = StepPlan(self.param_groups, self.state, params, grads, self.backend)
        _, states = find_tensors(params, self.state)
        all_inputs = plan.read(params, grads, states, reorders=True)
        if all_inputs is None:
            raise RuntimeError(
                "a parameter, its gradient or its state changed while its step was planned; do not "
                "change them from another thread"
            )
        # A plan without master weights forgets their remainders where it is made, and there alone.
        others = self._plans.items()
        self._plans = {k: each for k, each in others if each.has_masters == plan.has_masters}
        while len(self._plans) >= _MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[key] = plan
        return plan, all_inputs

    def _traced_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Make the step as the operator `czm_fused::step_`, which graphs can hold."""
        params: list[Tensor] = []
        grads: list[Tensor | None] = []
        flags: list[int] = []
        indices: list[int] = []
        first = 0
        lists: tuple[list[Tensor], ...] = tuple([] for _ in STATES)
        for index, group in enumerate(self.param_groups):
            # Dynamo runs _init_group instead of tracing it, and takes lists that are empty.
            its_params: list[Tensor] = []
            its_grads: list[Tensor | None] = []
            its_flags: list[int] = []
            its_lists: tuple[list[Tensor], ...] = tuple([] for _ in STATES)
            self._init_group(group, first, its_params, its_grads, its_flags, *its_lists)
            first += len(group["params"])
            indices += [index] * len(its_params)
            params, grads, flags = params + its_params, grads + its_grads, flags + its_flags
            lists = tuple(a + b for a, b in zip(lists, its_lists, strict=True))
        ours = list(map(sharding.local, params))
        local_grads = sharding.local_grads(params, grads)
        states = states_of([list(map(sharding.local, tensors)) for tensors in lists], flags)
        hyperparameters = self._traced_hyperparameters()
        tensors = list(map(StepTensor.of, ours, map(StepFlag, flags), indices))
        for (_, backend), numbers in split(ours, local_grads, tensors, self.backend).items():
            torch.ops.czm_fused.step_(
                select(numbers, ours),
                select(numbers, local_grads),
                *state_lists(select(numbers, states), select(numbers, flags)),
                select(numbers, flags),
                select(numbers, indices),
                hyperparameters,
                backend,
                grad_scale,
                found_inf,
            )

    def _init_group(
        self,
        group: dict[str, Any],
        first: int,
        params: list[Tensor],
        grads: list[Tensor | None],
        flags: list[int],
        *lists: list[Tensor],
    ) -> None:
        """Append the tensors and flags of a step of `group`, creating the state that is missing.

        The name is that of torch's optimizers, which Dynamo knows: it guards such state by its
        identity, where it guards the layout of each tensor else.
        """
        for number, param in enumerate(group["params"], start=first):
            if param.grad is None:
                continue
            its_flags = flags_of(param, group)
            state = self.state[param]
            prepare(number, param, its_flags, state)
            params.append(param)
            grads.append(param.grad)
            flags.append(int(its_flags))
            for spec, tensors in zip(STATES, lists, strict=True):
                if spec.belongs_to(its_flags):
                    tensors.append(state[spec.name])

    def _traced_hyperparameters(self) -> Tensor:
        rows = [[group[name] for name in HYPERPARAMETER_NAMES] for group in self.param_groups]
        devices = [x.device for row in rows for x in row if isinstance(x, Tensor)]
        # Numbers join the tensors that the host must not wait for.
        device = next((device for device in devices if device.type != "cpu"), "cpu")
        return torch.stack(
            [
                torch.stack(
                    [torch.as_tensor(x, dtype=torch.float64, device=device).squeeze() for x in row]
                )
                for row in rows
            ]
        )


class _Converted:
    """The hyperparameters of all groups as kernels take them, and what they were made of.

    Args:
        param_groups: the groups.
        values: their hyperparameters, in order.
        before: what an earlier step has converted, or None.

    Raises:
        ValueError: a hyperparameter that is not in its range.
    """

    def __init__(
        self, param_groups: list[dict[str, Any]], values: list[Any], before: _Converted | None
    ) -> None:
        changed = None if before is None else before._changed(values)
        if before is not None and changed is not None:
            # A rate that a scheduler has changed, most often: the rest has been checked.
            numbers = {}
            for number in changed:
                index, column = divmod(number, len(HYPERPARAMETERS))
                hyperparameter = HYPERPARAMETERS[column]
                if hyperparameter.flag or not hyperparameter.is_valid(values[number]):
                    check_hyperparameters(param_groups[index])
                numbers[index, column] = values[number]
            self.hyperparameters: Hyperparameters = before.hyperparameters.replaced(numbers)
        else:
            rows: list[list[float | DeviceScalar]] = []
            for group in param_groups:
                check_hyperparameters(group)
                device = group["params"][0].device if group["params"] else None
                rows.append([scalar(name, group[name], device) for name in HYPERPARAMETER_NAMES])
            self.hyperparameters = Hyperparameters(rows)
        self.switches = self.hyperparameters.are_set(_SWITCHES)
        self._values = values
        # A tensor's value may change while it remains the same tensor.
        self._is_constant = not any([isinstance(value, Tensor) for value in values])

    def is_of(self, values: list[Any]) -> bool:
        """Return True if `values` are what the hyperparameters were made of."""
        return (
            self._is_constant
            and len(values) == len(self._values)
            and all(map(operator.is_, values, self._values))
        )

    def _changed(self, values: list[Any]) -> list[int] | None:
        """Return which values are other numbers than before, or None if more has changed."""
        if not self._is_constant or len(values) != len(self._values):
            return None
        changed = [
            n for n, old in enumerate(self._values) if values[n] is not old
        ]
        return changed if {type(values[n]) for n in changed} <= {float} else None
