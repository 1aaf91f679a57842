"""The step in plain torch: the oracle of every kernel, and the backend `reference`.

Written from the paper (Ruff, Beck, Bach, arXiv 1911.13173), not from the kernels: `V` and `exp(g)`
are formed, stepped and multiplied again, where the kernels never form `V`.
"""

# torch is typed in part.
# mypy: no-warn-return-any

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor
from czm_fused.ops.step.spec import STATE_NAMES, StepFlag, compute_dtype
from czm_fused.ops.step.tensors import StepInputs


def filter_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each filter `weight[f]`, shape `(out_channels,)`.

    In `compute_dtype(weight.dtype)`.
    """
    rows = weight.flatten(1).to(compute_dtype(weight.dtype))
    return torch.linalg.vector_norm(rows, dim=1)


def initial_log_scale(weight: Tensor) -> Tensor:
    """Return `g = log ‖W[f]‖`, the log-scale at which every direction has unit norm.

    A filter of norm zero has no direction; its `g` is 0.
    """
    norms = filter_norms(weight)
    return torch.where(norms > 0, norms, 1.0).log()


def subtract_spatial_mean(grad: Tensor, zmg: float | Tensor) -> Tensor:
    """Return `grad - zmg * mean_over_taps(grad)`, the paper's CZMG (§3.3).

    Args:
        grad: `(out_channels, in_channels / groups, *kernel_size)`.
        zmg: the share of the mean to remove, in [0, 1]. Slices with one tap have no mean to remove.
    """
    if math.prod(grad.shape[2:]) <= 1:
        return grad
    return grad - zmg * grad.mean(dim=tuple(range(2, grad.dim())), keepdim=True)


def exact_param(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 weights that `set_param_` has split.

    A weight that was set from outside keeps the remainder it had, at most half a unit in its last
    place; a zero, whose bits have none below them, keeps no negative one.

    Args:
        param: bfloat16 or float16.
        remainder: int16, of the same shape.
    """
    remainder = remainder.where((param != 0) | (remainder > 0), 0)
    return (param.to(torch.float32).view(torch.int32) + remainder).view(torch.float32)


def set_param_(param: Tensor, weight: Tensor, remainder: Tensor | None = None) -> None:
    """Round `weight` to `param`, and keep in `remainder` what `exact_param` needs to undo it.

    The remainder is the distance between the bits of the two as float32, so parameter and remainder
    together are the float32 weight, but where the distance exceeds an int16: one unit in the last
    place is lost where a tie rounds down, and float16 below 2**-17 has only its own precision.
    """
    param.copy_(weight)
    if remainder is not None:
        exact, rounded = (x.to(torch.float32).view(torch.int32) for x in (weight, param))
        # As in C, where the difference wraps around: the halves of NaN have different signs.
        remainder.copy_((exact - rounded).clamp(-(2**15), 2**15 - 1))


def step_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    log_scale: Tensor | None = None,
    log_scale_momentum_buffer: Tensor | None = None,
    param_remainder: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    zmg: float | Tensor = 0.0,
    luma: float | Tensor = 0.0,
    grad_norm: float | Tensor = 0.0,
) -> None:
    """Update one parameter and its state in place by one step of the paper's optimizer.

    With `V = W / exp(g)`, for every filter (§3.1, §3.3, §3.4)::

        dW = grad_norm / (‖W‖ * ‖dW‖) * dW                   unless grad_norm is 0
        dV = exp(g) * dW + d/dV luma * (‖V‖ - 1)²,    dg = <dW, W>
        dV = dV - zmg * mean_over_taps(dV) + weight_decay * V
        m  = momentum * m + (1 - dampening) * dV,     V = V - lr * m
        mg = momentum * mg + (1 - dampening) * dg,    g = g - lr * mg
        W  = exp(g) * V

    Args:
        param: `W`, `(out_channels, in_channels / groups, *kernel_size)`; any shape if nothing but
            plain momentum SGD is asked of it (`log_scale` None, `zmg`, `luma` and `grad_norm` 0).
        grad: `dW`, of the same shape.
        momentum_buffer: `m`, of the same shape, or None without momentum.
        log_scale: `g`, `(out_channels,)`, or None for filters that are not exp-scaled.
        log_scale_momentum_buffer: `mg`, `(out_channels,)`, or None.
        param_remainder: what `W` is in float32 beyond `param`, of its shape, int16, or None.
    """
    dtype = compute_dtype(param.dtype)
    weight, dweight = param.to(dtype), grad.to(dtype)
    if param_remainder is not None:
        weight = exact_param(param, param_remainder)
    if maximize:
        dweight = -dweight
    if _nonzero(grad_norm):
        weight_norms, grad_norms = filter_norms(weight), filter_norms(dweight)
        # A filter of zeros has no direction, and 1 for its norm, as for its scale.
        norms = torch.where(weight_norms != 0, weight_norms, 1.0) * grad_norms
        has_norm = (torch.as_tensor(grad_norm) > 0) & (norms > 0)
        factors = (grad_norm / norms).clamp(max=torch.finfo(dtype).max)
        dweight = dweight * _per_filter(torch.where(has_norm, factors, 1.0), dweight)

    direction, direction_grad = weight, dweight
    if log_scale is not None:
        scale = _per_filter(log_scale.exp(), weight)
        # A filter whose exp(g) is 0 in this arithmetic has lost its direction.
        direction = torch.where(scale > 0, weight / scale, 0.0)
        direction_grad = dweight * scale
        log_scale_grad = (dweight * weight).flatten(1).sum(dim=1)
        step = _momentum_step(
            log_scale_grad, log_scale_momentum_buffer, momentum, dampening, nesterov
        )
        log_scale.sub_(lr * step)

    if _nonzero(luma):
        norms = _per_filter(filter_norms(direction), direction)
        # The gradient of (‖V‖ - 1)²; a filter of norm zero, or of none that can be had, has none.
        has_anchor = (norms > 0) & norms.isfinite()
        anchor = torch.where(has_anchor, 2 * (norms - 1) / norms, 0.0) * direction
        direction_grad = direction_grad + luma * anchor
    if _nonzero(zmg) and param.dim() > 2:
        direction_grad = subtract_spatial_mean(direction_grad, zmg)
    if _nonzero(weight_decay):
        direction_grad = direction_grad + weight_decay * direction

    step = _momentum_step(direction_grad, momentum_buffer, momentum, dampening, nesterov)
    direction = direction - lr * step
    if log_scale is not None:
        direction = _per_filter(log_scale.exp(), direction) * direction
    set_param_(param, direction, param_remainder)


def _nonzero(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) or value != 0


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _momentum_step(
    grad: Tensor,
    buffer: Tensor | None,
    momentum: float | Tensor,
    dampening: float | Tensor,
    nesterov: bool,
) -> Tensor:
    if buffer is None:
        return grad
    averaged = momentum * buffer.to(grad.dtype) + (1 - dampening) * grad
    buffer.copy_(averaged)
    return grad + momentum * averaged if nesterov else averaged


class ReferenceStep:
    """Runs `step_` over the tensors of a plan, one after the other, on any device.

    Args:
        tensors: the parameters as planned; None for those that are not stepped.
    """

    unscales_grads = False

    def __init__(self, tensors: Sequence[StepTensor | None]) -> None:
        self._tensors = tensors

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if found_inf is not None and found_inf.item() != 0:
            return
        groups = [hyperparameters.group(index) for index in range(len(hyperparameters))]
        for tensor, param, grad, state in zip(
            self._tensors, inputs.params, inputs.grads, inputs.states, strict=True
        ):
            if grad is None or tensor is None:
                continue
            if grad_scale is not None:
                # In the dtype of the arithmetic: a half gradient would be rounded, or vanish.
                grad = grad.to(compute_dtype(grad.dtype)) / grad_scale
            its_state = {name: (state or {}).get(name) for name in STATE_NAMES}
            options = _options_of(tensor.flags, groups[tensor.group_index], its_state.pop("step"))
            step_(param, grad, **its_state, **options)  # type: ignore[arg-type]


def _options_of(
    flags: StepFlag, group: dict[str, float | Tensor], step: Tensor | None
) -> dict[str, float | Tensor]:
    """Return the hyperparameters that `step_` takes for a tensor on which `flags` act."""
    options = dict(group)
    if not flags & StepFlag.MOMENTUM:
        options["momentum"] = 0.0
    # Without momentum torch.optim.SGD ignores dampening, and so it does at the first step.
    if not flags & StepFlag.MOMENTUM or (step is not None and step.item() == 0):
        options["dampening"] = 0.0
    if not flags & StepFlag.ZERO_MEAN:
        options["zmg"] = 0.0
    if not flags & StepFlag.ANCHOR:
        options["luma"] = 0.0
    if not flags & StepFlag.GRAD_NORM:
        options["grad_norm"] = 0.0
    return {**options, "nesterov": bool(group["nesterov"]), "maximize": bool(group["maximize"])}
