"""How far rounding alone can take a step from the oracle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from czm_fused.ops.step import reference
from czm_fused.ops.step.spec import compute_dtype

if TYPE_CHECKING:
    from helpers.cases import Case


def error_bounds(
    case: Case, inputs: dict[str, Tensor], expected: dict[str, Tensor], grad_scale: float
) -> dict[str, Tensor]:
    """Return how far each output of a step may be from the oracle's: rounding and nothing else.

    A first-order propagation of the roundings of the step's equations, in units of the arithmetic's
    eps (twice the unit roundoff), over the absolute values of the terms that are added:

    - a product or a sum adds 1, and so does a hyper-parameter that is rounded;
    - `exp(g)` adds `4 + |g|`: an exponential through base 2 rounds its argument;
    - a sum of N terms adds `2 sqrt(N)`, as any sum in blocks does; a sum over the taps, in any
      order, `taps`;
    - the factor of `grad_norm` has half the errors of two sums of N squares, and 6 roundings;
    - `(n - 1) / n` loses nothing but what `n` has lost, of terms of size `1 + 1 / n`;
    - an output of a half dtype is rounded once more, by half of that dtype's eps (or of its least
      subnormal), but a parameter with a remainder only by the latter.

    Doubled, because the oracle rounds as well.
    """
    options = case.options
    x = {name: tensor.double() for name, tensor in inputs.items()}
    eps = torch.finfo(compute_dtype(case.dtype)).eps
    weight = x["param"].abs()
    is_filter = len(case.shape) > 1

    def per_filter(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (weight.dim() - 1))

    g = x["log_scale"] if "log_scale" in x else torch.zeros(case.shape[0] if is_filter else 1)
    g = per_filter(g.double()) if is_filter else g[0].double()
    scale, exp_error = g.exp(), 4 + g.abs()
    numel = weight[:1].numel() if is_filter else 1
    sum_error = 2 * math.sqrt(numel)

    grad = x["grad"].abs() / grad_scale
    factor_error = 0.0
    if is_filter and options.grad_norm != 0:
        norms = reference.filter_norms(x["param"])
        norms = per_filter(norms.where(norms > 0, 1) * reference.filter_norms(grad))
        grad = torch.where(norms > 0, options.grad_norm / norms, 1) * grad
        factor_error = sum_error + 6
    size = scale * grad
    error = eps * (exp_error + 3 + factor_error) * size
    if is_filter and options.luma != 0:
        norms = per_filter(reference.filter_norms(x["param"])) / scale
        anchor = 2 * options.luma * weight / scale
        anchor = torch.where(norms > 0, anchor * (1 + 1 / norms), 0 * anchor)
        size = size + anchor
        error = error + eps * (sum_error + 2 * exp_error + 8) * anchor
    taps = math.prod(case.shape[2:])
    if is_filter and options.zmg != 0 and taps > 1:
        dims = tuple(range(2, weight.dim()))
        mean = options.zmg * size.mean(dim=dims, keepdim=True)
        mean_error = options.zmg * error.mean(dim=dims, keepdim=True)
        error = error + mean_error + eps * (taps + 3) * mean
        size = size + mean
    decay = options.weight_decay * weight / scale
    size = size + decay
    error = error + eps * (exp_error + 3) * decay + 2 * eps * size

    bounds = {}

    def momentum_step(size: Tensor, error: Tensor, buffer: str) -> tuple[Tensor, Tensor]:
        if buffer not in x:
            return size, error
        undampened = 1 - (0.0 if case.first else options.dampening)
        old = options.momentum * x[buffer].abs()
        new_size = old + undampened * size
        new_error = undampened * error + 3 * eps * new_size
        bounds[buffer] = new_error
        if options.nesterov:
            error = error + options.momentum * new_error
            size = size + options.momentum * new_size
            return size, error + 3 * eps * size
        return new_size, new_error

    step_size, step_error = momentum_step(size, error, "momentum_buffer")
    keep, rate = torch.ones_like(g), options.lr * scale
    g_error = torch.zeros_like(g)
    if "log_scale" in x:
        dg_size = per_filter((grad * weight).flatten(1).sum(dim=1))
        dg_error = eps * (sum_error + 4 + factor_error) * dg_size
        buffer = "log_scale_momentum_buffer"
        if buffer in x:
            x[buffer] = per_filter(x[buffer])
        e_size, e_error = momentum_step(dg_size, dg_error, buffer)
        g_error = options.lr * (e_error + 2 * eps * e_size) + eps * (g.abs() + options.lr * e_size)
        bounds["log_scale"] = g_error
        new_g = per_filter(expected["log_scale"])
        keep, rate = (new_g - g).exp(), options.lr * new_g.exp()
    keep_error = g_error + 5 * eps
    rate_error = g_error + eps * (exp_error + 6)
    bounds["param"] = (
        keep * weight * keep_error
        + rate * (step_error + step_size * rate_error)
        + 2 * eps * (keep * weight + rate * step_size)
    )

    stored_in_half = {"momentum_buffer", "param"} if case.dtype.itemsize == 2 else set()
    if case.master_weights:
        stored_in_half.remove("param")
        # What the remainder of a tiny float16 cannot hold.
        stored = torch.finfo(case.dtype)
        bounds["param"] = bounds["param"] + 0.5 * stored.smallest_normal * stored.eps
    for name in bounds:
        bounds[name] = 2 * bounds[name].reshape(expected[name].shape)
        if name in stored_in_half:
            stored = torch.finfo(case.dtype)
            rounding = (0.5 * stored.eps * expected[name].abs()).clamp(
                min=0.5 * stored.smallest_normal * stored.eps
            )
            bounds[name] = bounds[name] * (1 + stored.eps) + rounding
    return bounds
