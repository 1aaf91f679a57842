"""Gradient release: the step of each parameter within backward, and its gradient freed at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from czm_fused.optim import FusedCZMSGD


class GradientRelease:
    """Step each parameter as soon as backward has its gradient, and free the gradient.

    Gradients never accumulate in memory: those of one layer exist at a time. Weights and state
    become, bit for bit, what `optimizer.step()` after backward makes of them; that call may stay in
    the training loop, where it finds no gradient, and with it learning-rate schedules, which see
    the next backward's rate in the optimizer's groups as ever. State is the optimizer's own, and
    with it `state_dict` and `load_state_dict`. Groups added later are not released.

    What needs all gradients at once cannot be had: every backward is a step, so batches are not
    accumulated; `clip_grad_norm_` finds nothing to clip; distributed wrappers that average
    gradients after backward's hooks average nothing. A GradScaler's factor would stay in the
    gradients: the scaler's step raises. A reentrant checkpoint runs a backward of its own, so a
    parameter in several of them, or in one and outside it, is stepped more than once: pass
    `use_reentrant=False`.

    Hooks of the optimizer's step (`register_step_post_hook`, `czm_fused.diagnostics.watch`) run in
    `optimizer.step()` alone, never in backward.

    Args:
        optimizer: whose parameters are stepped, by its present groups, until `remove()`, or until
            it and this are gone.

    Raises:
        TypeError: the optimizer is no `FusedCZMSGD`.
        ValueError: a parameter that needs no gradient, or has one that is waiting for a step.
    """

    def __init__(self, optimizer: FusedCZMSGD) -> None:
        if not isinstance(optimizer, FusedCZMSGD):
            raise TypeError(
                f"optimizer must be a FusedCZMSGD, but was a {type(optimizer).__name__}"
            )
        places = [
            (number, index, param)
            for number, group in enumerate(optimizer.param_groups)
            for index, param in enumerate(group["params"])
        ]
        for number, index, param in places:
            if not param.requires_grad or param.grad is not None:
                problem = "has a gradient already" if param.requires_grad else "needs no gradient"
                raise ValueError(
                    f"parameter {index} of group {number} {problem}; gradients are released from "
                    "parameters that require them, after zero_grad()"
                )
        self._handles: list[RemovableHandle] = [
            param.register_post_accumulate_grad_hook(_ParamStep(optimizer, number, param))
            for number, _, param in places
        ]
        self._handles.append(optimizer.register_step_pre_hook(_refuse_scaled_gradients))
        self._optimizer: FusedCZMSGD | None = optimizer
        self._supported_amp_scaling = optimizer._step_supports_amp_scaling
        # Else a GradScaler would look for gradients of its own, and fail without naming the cause.
        optimizer._step_supports_amp_scaling = True

    def remove(self) -> None:
        """Let gradients stay after backward again; a second call does nothing."""
        if self._optimizer is None:
            return
        for handle in self._handles:
            handle.remove()
        self._optimizer._step_supports_amp_scaling = self._supported_amp_scaling
        self._optimizer = None


class _ParamStep:
    """Steps one parameter, by an optimizer of its own that borrows all it has from the other.

    It keeps neither parameter nor optimizer: a parameter keeps its hooks, and Python cannot collect
    such a cycle.
    """

    def __init__(self, optimizer: FusedCZMSGD, group: int, param: Tensor) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._group = group
        self._own = FusedCZMSGD(
            [{**optimizer.param_groups[group], "params": [param]}], backend=optimizer.backend
        )
        self._give_back()

    def __call__(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._own.param_groups[0] = {**optimizer.param_groups[self._group], "params": [param]}
        self._own.state[param] = optimizer.state[param]
        try:
            self._own.step()
        finally:
            self._give_back()
        param.grad = None

    def _give_back(self) -> None:
        self._own.param_groups[0] = {"params": []}
        self._own.state.clear()


def _refuse_scaled_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A GradScaler hands it over, whether it has unscaled the gradients itself or not.
    if hasattr(optimizer, "found_inf"):
        raise RuntimeError(
            "the gradients of this optimizer are released in backward, where a GradScaler cannot "
            "unscale them, so this step has been taken with scaled ones; train in bfloat16, which "
            "needs no scaling, or without GradientRelease"
        )
