"""The update rule in Triton, as `csrc/update_rule.h` states it in C++."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES

_LR = tl.constexpr(HYPERPARAMETER_NAMES.index("lr"))
_MOMENTUM = tl.constexpr(HYPERPARAMETER_NAMES.index("momentum"))
_DAMPENING = tl.constexpr(HYPERPARAMETER_NAMES.index("dampening"))
_WEIGHT_DECAY = tl.constexpr(HYPERPARAMETER_NAMES.index("weight_decay"))
_ZMG = tl.constexpr(HYPERPARAMETER_NAMES.index("zmg"))
_LUMA = tl.constexpr(HYPERPARAMETER_NAMES.index("luma"))
_GRAD_NORM = tl.constexpr(HYPERPARAMETER_NAMES.index("grad_norm"))
_NESTEROV = tl.constexpr(HYPERPARAMETER_NAMES.index("nesterov"))
_MAXIMIZE = tl.constexpr(HYPERPARAMETER_NAMES.index("maximize"))


class Hyperparameters(NamedTuple):
    """The hyperparameters of a tensor's group, with what its state makes of them."""

    lr: tl.tensor
    momentum: tl.tensor
    one_minus_dampening: tl.tensor
    weight_decay: tl.tensor
    zmg: tl.tensor
    luma: tl.tensor
    grad_norm: tl.tensor
    nesterov: tl.tensor
    grad_factor: tl.tensor  # the sign of maximize over the scale of GradScaler


class FilterSums(NamedTuple):
    """The sums over a filter that its rule is made of; zeros for a tensor that needs none."""

    weight_weight: tl.tensor  # <W, W>
    grad_weight: tl.tensor  # <dW, W>
    grad_grad: tl.tensor  # <dW, dW>


class FilterRule(NamedTuple):
    """The coefficients of the weights' update."""

    grad: tl.tensor  # dV takes grad * dW
    weight: tl.tensor  # and weight * W, the anchor's gradient
    mean: tl.tensor  # times the sum over taps is what CZMG removes
    decay: tl.tensor  # times W is added after CZMG
    momentum: tl.tensor
    one_minus_dampening: tl.tensor
    keep: tl.tensor  # W' = keep * W + rate * d
    rate: tl.tensor
    nesterov: tl.tensor


@triton.jit
def _hyperparameter(addresses, values, COLUMN: tl.constexpr, REAL: tl.constexpr):
    address = tl.load(addresses + COLUMN)
    on_device = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, on_device.to(REAL), tl.load(values + COLUMN))


@triton.jit
def hyperparameters(addresses, values, step, has_momentum, grad_scale, REAL: tl.constexpr):
    """Read the hyperparameters of a group, for a tensor with the number of updates at `step`."""
    momentum = _hyperparameter(addresses, values, _MOMENTUM, REAL)
    dampening = _hyperparameter(addresses, values, _DAMPENING, REAL)
    # Without momentum torch.optim.SGD ignores dampening, and so it does at a tensor's first update.
    updates = tl.load(step.to(tl.pointer_type(tl.float32)), mask=step != 0, other=1.0)
    maximize = _hyperparameter(addresses, values, _MAXIMIZE, REAL) != 0
    grad_factor = tl.where(maximize, tl.full([], -1.0, REAL), tl.full([], 1.0, REAL))
    if grad_scale is not None:
        grad_factor = grad_factor / tl.load(grad_scale).to(REAL)
    return Hyperparameters(
        lr=_hyperparameter(addresses, values, _LR, REAL),
        momentum=tl.where(has_momentum, momentum, 0.0),
        one_minus_dampening=tl.where(has_momentum & (updates != 0), 1 - dampening, 1.0),
        weight_decay=_hyperparameter(addresses, values, _WEIGHT_DECAY, REAL),
        zmg=_hyperparameter(addresses, values, _ZMG, REAL),
        luma=_hyperparameter(addresses, values, _LUMA, REAL),
        grad_norm=_hyperparameter(addresses, values, _GRAD_NORM, REAL),
        nesterov=_hyperparameter(addresses, values, _NESTEROV, REAL) != 0,
        grad_factor=grad_factor,
    )


@triton.jit
def _filter_grad_factor(hyper, sums, LARGEST: tl.constexpr):
    weight_norm = tl.where(sums.weight_weight == 0, 1.0, tl.sqrt(sums.weight_weight))
    norm = weight_norm * tl.sqrt(sums.grad_grad)
    has_norm = (hyper.grad_norm > 0) & (norm > 0)
    factor = hyper.grad_norm / tl.where(has_norm, norm, 1.0)
    factor = tl.where(factor <= LARGEST, factor, LARGEST)
    return tl.where(has_norm, tl.where(hyper.grad_factor < 0, -factor, factor), hyper.grad_factor)


@triton.jit
def filter_rule(hyper, sums, taps, exp_scaled, g, g_momentum, REAL: tl.constexpr):
    """From the sums over a filter to its rule, its new g, and the momentum of g."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if REAL == tl.float64 else 3.4028234663852886e38
    SMALLEST_NORMAL: tl.constexpr = (
        2.2250738585072014e-308 if REAL == tl.float64 else 1.1754943508222875e-38
    )
    scale = tl.exp(g)
    # 0 where exp(g) is subnormal: the direction is lost, as csrc/update_rule.h says.
    is_normal = scale >= SMALLEST_NORMAL
    inverse_scale = tl.where(is_normal, 1.0 / tl.where(is_normal, scale, 1.0), 0.0)
    norm = tl.sqrt(sums.weight_weight) * inverse_scale
    # <W, W> underflows or overflows long before W does, and then the norm is not known.
    has_anchor = (norm > 0) & (norm <= LARGEST)
    anchor = 2 * hyper.luma * ((norm - 1) / tl.where(has_anchor, norm, 1.0)) * inverse_scale
    factor = _filter_grad_factor(hyper, sums, LARGEST)
    dg = factor * sums.grad_weight
    new_g_momentum = tl.fma(hyper.one_minus_dampening, dg, hyper.momentum * g_momentum)
    nesterov_direction = tl.fma(hyper.momentum, new_g_momentum, dg)
    new_g = tl.fma(-hyper.lr, tl.where(hyper.nesterov, nesterov_direction, new_g_momentum), g)
    # Bounded, so that a weight of 0 stays 0, also where both g are -inf.
    keep = tl.exp(new_g - g)
    keep = tl.where(keep <= LARGEST, keep, LARGEST)
    keep = tl.where(exp_scaled, keep, 1.0)
    rule = FilterRule(
        grad=factor * scale,
        weight=tl.where(has_anchor, anchor, 0.0),
        mean=tl.where(taps > 1, hyper.zmg / taps.to(REAL), 0.0),
        decay=hyper.weight_decay * inverse_scale,
        momentum=hyper.momentum,
        one_minus_dampening=hyper.one_minus_dampening,
        keep=keep,
        rate=-hyper.lr * tl.where(exp_scaled, tl.exp(new_g), 1.0),
        nesterov=hyper.nesterov,
    )
    return rule, new_g, new_g_momentum
