"""The kernel of the fused step: one program updates one filter, or one block of a plain tensor.

A filter is read twice: once for <W, W> and <dW, W>, and, while it is still in the cache, once for
the update, as in `csrc/cpu/step_kernel.h`. So filters of any size take one path and few registers:
device memory is read once, and many programs are in flight, which is what hides its latency.

Weights are read and written contiguously, 16 bytes a thread. Taps do not divide a power of two, so
the sums that CZMG removes come from another read of the tile, with one channel a lane: no lane is
padding, `TILE` channels are exactly `taps` tiles of weights, and the cache has them at hand.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from czm_fused.ops.step.spec import DESCRIPTOR_FIELDS, FIELD, HYPERPARAMETER_NAMES

_ROW_COLUMNS = tl.constexpr(len(DESCRIPTOR_FIELDS))
_PARAM = tl.constexpr(FIELD["param"])
_MOMENTUM_BUFFER = tl.constexpr(FIELD["momentum_buffer"])
_LOG_SCALE = tl.constexpr(FIELD["log_scale"])
_LOG_SCALE_MOMENTUM_BUFFER = tl.constexpr(FIELD["log_scale_momentum_buffer"])
_STEP = tl.constexpr(FIELD["step"])
_PARAM_REMAINDER = tl.constexpr(FIELD["param_remainder"])
_NUMEL = tl.constexpr(FIELD["numel"])
_FILTER_NUMEL = tl.constexpr(FIELD["filter_numel"])
_TAPS = tl.constexpr(FIELD["taps"])
_CHANNELS_LAST = tl.constexpr(FIELD["channels_last"])
_NEEDS_NORMS = tl.constexpr(FIELD["needs_norms"])
_GROUP = tl.constexpr(FIELD["group"])
_FIRST_FILTER = tl.constexpr(FIELD["first_filter"])

_GROUP_COLUMNS = tl.constexpr(len(HYPERPARAMETER_NAMES))
_LR = tl.constexpr(HYPERPARAMETER_NAMES.index("lr"))
_MOMENTUM = tl.constexpr(HYPERPARAMETER_NAMES.index("momentum"))
_DAMPENING = tl.constexpr(HYPERPARAMETER_NAMES.index("dampening"))
_WEIGHT_DECAY = tl.constexpr(HYPERPARAMETER_NAMES.index("weight_decay"))
_ZMG = tl.constexpr(HYPERPARAMETER_NAMES.index("zmg"))
_LUMA = tl.constexpr(HYPERPARAMETER_NAMES.index("luma"))
_NESTEROV = tl.constexpr(HYPERPARAMETER_NAMES.index("nesterov"))
_MAXIMIZE = tl.constexpr(HYPERPARAMETER_NAMES.index("maximize"))


class _Hyperparameters(NamedTuple):
    lr: tl.tensor
    momentum: tl.tensor
    one_minus_dampening: tl.tensor
    weight_decay: tl.tensor
    zmg: tl.tensor
    luma: tl.tensor
    nesterov: tl.tensor
    grad_factor: tl.tensor  # the sign of maximize over the scale of GradScaler


class _FilterRule(NamedTuple):
    """The coefficients of the weights' update, as in `csrc/update_rule.h`."""

    grad: tl.tensor  # dV takes grad * dW
    weight: tl.tensor  # and weight * W, the anchor's gradient
    mean: tl.tensor  # times the sum over taps is what CZMG removes
    decay: tl.tensor  # times W is added after CZMG
    momentum: tl.tensor
    one_minus_dampening: tl.tensor
    keep: tl.tensor  # W' = keep * W + rate * d
    rate: tl.tensor
    nesterov: tl.tensor


class _Filter(NamedTuple):
    weight: tl.tensor  # addresses
    grad: tl.tensor
    momentum: tl.tensor  # 0 without momentum
    remainder: tl.tensor  # 0 without SPLIT
    numel: tl.tensor
    taps: tl.tensor
    channels_last: tl.tensor


@triton.jit
def _hyperparameter(addresses, values, COLUMN: tl.constexpr, REAL: tl.constexpr):
    address = tl.load(addresses + COLUMN)
    on_device = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, on_device.to(REAL), tl.load(values + COLUMN))


@triton.jit
def _hyperparameters(row, addresses, values, has_momentum, grad_scale, REAL: tl.constexpr):
    momentum = _hyperparameter(addresses, values, _MOMENTUM, REAL)
    dampening = _hyperparameter(addresses, values, _DAMPENING, REAL)
    # Without momentum torch.optim.SGD ignores dampening, and so it does at a tensor's first update.
    step = tl.load(row + _STEP)
    updates = tl.load(step.to(tl.pointer_type(tl.float32)), mask=step != 0, other=1.0)
    maximize = _hyperparameter(addresses, values, _MAXIMIZE, REAL) != 0
    grad_factor = tl.where(maximize, tl.full([], -1.0, REAL), tl.full([], 1.0, REAL))
    if grad_scale is not None:
        grad_factor = grad_factor / tl.load(grad_scale).to(REAL)
    return _Hyperparameters(
        lr=_hyperparameter(addresses, values, _LR, REAL),
        momentum=tl.where(has_momentum, momentum, 0.0),
        one_minus_dampening=tl.where(has_momentum & (updates != 0), 1 - dampening, 1.0),
        weight_decay=_hyperparameter(addresses, values, _WEIGHT_DECAY, REAL),
        zmg=_hyperparameter(addresses, values, _ZMG, REAL),
        luma=_hyperparameter(addresses, values, _LUMA, REAL),
        nesterov=_hyperparameter(addresses, values, _NESTEROV, REAL) != 0,
        grad_factor=grad_factor,
    )


@triton.jit
def _filter_rule(
    hyper, weight_weight, grad_weight, taps, exp_scaled, g, g_momentum, REAL: tl.constexpr
):
    """From <W, W> and <dW, W> to the rule of this filter, its new g, and the momentum of g."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if REAL == tl.float64 else 3.4028234663852886e38
    SMALLEST_NORMAL: tl.constexpr = (
        2.2250738585072014e-308 if REAL == tl.float64 else 1.1754943508222875e-38
    )
    scale = tl.exp(g)
    # 0 where exp(g) is subnormal: the direction is lost, as csrc/update_rule.h says.
    is_normal = scale >= SMALLEST_NORMAL
    inverse_scale = tl.where(is_normal, 1.0 / tl.where(is_normal, scale, 1.0), 0.0)
    norm = tl.sqrt(weight_weight) * inverse_scale
    # <W, W> underflows or overflows long before W does, and then the norm is not known.
    has_anchor = (norm > 0) & (norm <= LARGEST)
    anchor = 2 * hyper.luma * ((norm - 1) / tl.where(has_anchor, norm, 1.0)) * inverse_scale
    dg = hyper.grad_factor * grad_weight
    new_g_momentum = tl.fma(hyper.one_minus_dampening, dg, hyper.momentum * g_momentum)
    nesterov_direction = tl.fma(hyper.momentum, new_g_momentum, dg)
    new_g = tl.fma(-hyper.lr, tl.where(hyper.nesterov, nesterov_direction, new_g_momentum), g)
    # Bounded, so that a weight of 0 stays 0, also where both g are -inf.
    keep = tl.exp(new_g - g)
    keep = tl.where(keep <= LARGEST, keep, LARGEST)
    keep = tl.where(exp_scaled, keep, 1.0)
    rule = _FilterRule(
        grad=hyper.grad_factor * scale,
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


@triton.jit
def _multiple(number, VECTOR: tl.constexpr):
    """Return `number`, a multiple of VECTOR, so that the compiler sees that it is one."""
    # No hint: those mark the number itself, for the code that knows it unaligned as well.
    return number // VECTOR * VECTOR


@triton.jit
def _pointers(filter, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    ALIGNMENT: tl.constexpr = VECTOR * DTYPE.primitive_bitwidth // 8
    weights = tl.multiple_of(filter.weight.to(tl.pointer_type(DTYPE)), ALIGNMENT)
    grads = tl.multiple_of(filter.grad.to(tl.pointer_type(DTYPE)), ALIGNMENT)
    momenta = tl.multiple_of(filter.momentum.to(tl.pointer_type(DTYPE)), ALIGNMENT)
    # int16 has the size of the dtypes that have remainders, and for others the hint is not used.
    remainders = tl.multiple_of(filter.remainder.to(tl.pointer_type(tl.int16)), 2 * VECTOR)
    return weights, remainders, grads, momenta


@triton.jit
def _load_weight(weights, remainders, offsets, mask, REAL: tl.constexpr, SPLIT: tl.constexpr):
    weight = tl.load(weights + offsets, mask=mask, other=0.0).to(REAL)
    if SPLIT:
        remainder = tl.load(remainders + offsets, mask=mask, other=0)
        remainder = tl.where((weight == 0) & (remainder < 0), 0, remainder)
        weight = (weight.to(tl.int32, bitcast=True) + remainder).to(tl.float32, bitcast=True)
    return weight


@triton.jit
def _store_weight(weights, remainders, offsets, mask, weight, SPLIT: tl.constexpr):
    param = weight.to(weights.dtype.element_ty)
    tl.store(weights + offsets, param, mask=mask)
    if SPLIT:
        rounded = param.to(tl.float32).to(tl.int32, bitcast=True)
        apart = weight.to(tl.int32, bitcast=True) - rounded
        remainder = tl.minimum(tl.maximum(apart, -(2**15)), 2**15 - 1).to(tl.int16)
        tl.store(remainders + offsets, remainder, mask=mask)


@triton.jit
def _reduce(
    filter, needs_norms, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """<W, W> and <dW, W> of a filter, or zeros where the rule does not need them."""
    weights, remainders, grads, _ = _pointers(filter, DTYPE, VECTOR)
    end = _multiple(tl.where(needs_norms, filter.numel, 0), VECTOR)
    weight_weight = tl.zeros([TILE], REAL)
    grad_weight = tl.zeros([TILE], REAL)
    tile = end * 0
    while tile * TILE < end:
        offsets = tile * TILE + tl.arange(0, TILE)
        mask = offsets < end
        weight = _load_weight(weights, remainders, offsets, mask, REAL, SPLIT)
        grad = tl.load(grads + offsets, mask=mask, other=0.0).to(REAL)
        weight_weight = tl.fma(weight, weight, weight_weight)
        grad_weight = tl.fma(grad, weight, grad_weight)
        tile += 1
    return tl.sum(weight_weight, axis=0), tl.sum(grad_weight, axis=0)


@triton.jit
def _direction_grad(
    weights, remainders, grads, offsets, mask, rule, REAL: tl.constexpr, SPLIT: tl.constexpr
):
    """dV before CZMG, the data gradient and the anchor's; and W."""
    weight = _load_weight(weights, remainders, offsets, mask, REAL, SPLIT)
    grad = tl.load(grads + offsets, mask=mask, other=0.0).to(REAL)
    return tl.fma(rule.grad, grad, rule.weight * weight), weight


@triton.jit
def _update_tile(
    weights, remainders, grads, momenta, has_momentum, offsets, mask, removed_mean, rule,
    REAL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    grad, weight = _direction_grad(weights, remainders, grads, offsets, mask, rule, REAL, SPLIT)
    momentum = tl.load(momenta + offsets, mask=mask & has_momentum, other=0.0).to(REAL)
    grad = tl.fma(rule.decay, weight, grad - removed_mean)
    momentum = tl.fma(rule.one_minus_dampening, grad, rule.momentum * momentum)
    direction = tl.where(rule.nesterov, tl.fma(rule.momentum, momentum, grad), momentum)
    weight = tl.fma(rule.rate, direction, rule.keep * weight)
    dtype: tl.constexpr = weights.dtype.element_ty
    tl.store(momenta + offsets, momentum.to(dtype), mask=mask & has_momentum)
    _store_weight(weights, remainders, offsets, mask, weight, SPLIT)


@triton.jit
def _update_without_mean(
    filter, rule, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    weights, remainders, grads, momenta = _pointers(filter, DTYPE, VECTOR)
    end = _multiple(filter.numel, VECTOR)
    tile = end * 0
    while tile * TILE < end:
        offsets = tile * TILE + tl.arange(0, TILE)
        _update_tile(
            weights, remainders, grads, momenta, filter.momentum != 0, offsets, offsets < end, 0.0,
            rule, REAL, SPLIT,
        )  # fmt: skip
        tile += 1


@triton.jit
def _sums_over_taps(
    weights, remainders, grads, channel, mask, channel_stride, tap_stride, taps, rule,
    REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([TILE], REAL)
    offsets = channel * channel_stride
    if TAPS > 0:
        for tap in tl.range(TAPS, num_stages=1, loop_unroll_factor=3):
            grad, _ = _direction_grad(
                weights, remainders, grads, offsets + tap * tap_stride, mask, rule, REAL, SPLIT
            )
            sums += grad
    else:
        tap = taps * 0
        while tap < taps:
            grad, _ = _direction_grad(
                weights, remainders, grads, offsets + tap * tap_stride, mask, rule, REAL, SPLIT
            )
            sums += grad
            tap += 1
    # Other threads may still be reading what this one is about to write.
    tl.debug_barrier()
    return sums


@triton.jit
def _update(
    filter, rule, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """All weights of a filter; TAPS is their number where the compiler shall know it, else 0."""
    weights, remainders, grads, momenta = _pointers(filter, DTYPE, VECTOR)
    has_momentum = filter.momentum != 0
    taps = filter.taps
    if TAPS > 0:
        taps = TAPS
    channels = _multiple(filter.numel // taps, VECTOR)
    channel_tile = channels * 0
    while channel_tile * TILE < channels:
        first = channel_tile * TILE
        channel = first + tl.arange(0, TILE)
        mask = channel < channels
        if filter.channels_last:
            removed_mean = rule.mean * _sums_over_taps(
                weights, remainders, grads, channel, mask, 1, channels, taps, rule, REAL, SPLIT,
                TILE, TAPS,
            )  # fmt: skip
            tap = channels * 0
            while tap < taps:
                _update_tile(
                    weights, remainders, grads, momenta, has_momentum, tap * channels + channel,
                    mask, removed_mean, rule, REAL, SPLIT,
                )  # fmt: skip
                tap += 1
        else:
            removed_mean = rule.mean * _sums_over_taps(
                weights, remainders, grads, channel, mask, taps, 1, taps, rule, REAL, SPLIT,
                TILE, TAPS,
            )  # fmt: skip
            end = tl.minimum(first + TILE, channels) * taps
            tile = channel_tile * taps
            while tile * TILE < end:
                offsets = tile * TILE + tl.arange(0, TILE)
                mask = offsets < end
                own_channel = tl.where(mask, offsets // taps - first, 0)
                _update_tile(
                    weights, remainders, grads, momenta, has_momentum, offsets, mask,
                    tl.gather(removed_mean, own_channel, 0), rule, REAL, SPLIT,
                )  # fmt: skip
                tile += 1
        channel_tile += 1


@triton.jit
def _step(
    row, number, addresses, values, grad, grad_scale, DTYPE: tl.constexpr, REAL: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update filter `number` of the tensor that `row` describes."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // BYTES
    filter_numel = tl.load(row + _FILTER_NUMEL)
    begin = number * filter_numel
    momentum = tl.load(row + _MOMENTUM_BUFFER)
    remainder = tl.load(row + _PARAM_REMAINDER)
    filter = _Filter(
        weight=tl.load(row + _PARAM) + begin * BYTES,
        grad=grad + begin * BYTES,
        momentum=tl.where(momentum != 0, momentum + begin * BYTES, 0),
        remainder=tl.where(remainder != 0, remainder + begin * 2, 0),
        numel=tl.minimum(tl.load(row + _NUMEL) - begin, filter_numel).to(tl.int32),
        taps=tl.load(row + _TAPS).to(tl.int32),
        channels_last=tl.load(row + _CHANNELS_LAST) != 0,
    )
    hyper = _hyperparameters(row, addresses, values, momentum != 0, grad_scale, REAL)

    # All threads read g before the barrier of the reductions, and one writes it after that.
    log_scale = tl.load(row + _LOG_SCALE)
    log_scales = log_scale.to(tl.pointer_type(REAL)) + number
    g = tl.load(log_scales, mask=log_scale != 0, other=0.0)
    log_scale_momentum = tl.load(row + _LOG_SCALE_MOMENTUM_BUFFER)
    log_scale_momenta = log_scale_momentum.to(tl.pointer_type(REAL)) + number
    g_momentum = tl.load(log_scale_momenta, mask=log_scale_momentum != 0, other=0.0)

    needs_norms = tl.load(row + _NEEDS_NORMS) != 0
    aligned = (filter.weight | filter.grad | filter.momentum | filter.remainder) % 16 == 0
    aligned = aligned & ((filter.numel // filter.taps) % VECTOR == 0)
    if aligned:
        weight_weight, grad_weight = _reduce(filter, needs_norms, DTYPE, REAL, SPLIT, TILE, VECTOR)
    else:
        weight_weight, grad_weight = _reduce(filter, needs_norms, DTYPE, REAL, SPLIT, TILE, 1)

    rule, new_g, new_g_momentum = _filter_rule(
        hyper, weight_weight, grad_weight, filter.taps, log_scale != 0, g, g_momentum, REAL
    )
    tl.store(log_scales, new_g, mask=log_scale != 0)
    tl.store(log_scale_momenta, new_g_momentum, mask=log_scale_momentum != 0)

    if rule.mean == 0:
        if aligned:
            _update_without_mean(filter, rule, DTYPE, REAL, SPLIT, TILE, VECTOR)
        else:
            _update_without_mean(filter, rule, DTYPE, REAL, SPLIT, TILE, 1)
    elif aligned & (filter.taps == 9):
        _update(filter, rule, DTYPE, REAL, SPLIT, TILE, VECTOR, 9)
    else:
        _update(filter, rule, DTYPE, REAL, SPLIT, TILE, 1, 0)


@triton.jit(
    do_not_specialize=["row_count", "group_count"],
    do_not_specialize_on_alignment=[
        "rows", "program_rows", "arguments", "grad_scale", "found_inf"
    ],
)  # fmt: skip
def step_kernel(
    rows, program_rows, arguments, row_count, group_count, grad_scale, found_inf,
    DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update the filter, or the block of a plain tensor, that this program owns.

    Args:
        rows: the descriptor table, int64, (row_count, columns).
        program_rows: the row of each program, int32.
        arguments: int64: the address of each row's gradient; for each group's hyperparameters the
            address of a float32 that stands for it, or 0; their values, as REAL.
        grad_scale: what gradients are divided by, float32, or None.
        found_inf: nothing is updated where it is not 0, float32, or None.
        DTYPE: of parameters, gradients and momentum.
        REAL: of the arithmetic and of the log-scales.
        SPLIT: whether the parameters are the rounding of float32 weights, and have remainders.
        TILE: the weights that a program has in its registers at a time.
    """
    program = tl.program_id(0)
    row_number = tl.load(program_rows + program)
    row = rows + row_number.to(tl.int64) * _ROW_COLUMNS
    number = program - tl.load(row + _FIRST_FILTER)
    group = tl.load(row + _GROUP) * _GROUP_COLUMNS
    addresses = arguments + row_count
    values = addresses + group_count * _GROUP_COLUMNS
    values = values.to(tl.pointer_type(REAL), bitcast=True) + group
    grad = tl.load(arguments + row_number)
    skip = tl.full([], 0.0, tl.float32)
    if found_inf is not None:
        skip = tl.load(found_inf).to(tl.float32)
    if (skip == 0) & (grad != 0):
        _step(row, number, addresses + group, values, grad, grad_scale, DTYPE, REAL, SPLIT, TILE)
