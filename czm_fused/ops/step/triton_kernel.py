"""The kernel of the fused step: one program updates one filter, or one block of a plain tensor.

A filter is taken in tiles of TILE weights, each the taps of `tile_channels` channels. A filter of a
few tiles is loaded as a whole, W, dW and m at once, and held in registers until it is stored: each
weight is read once. A longer one is read twice, for <W, W> and <dW, W>, then for the update.

Threads hold a tile in the order of its memory, so that loads and stores are contiguous in either
layout. The sums over the taps, which CZMG removes, are taken from shared memory, where `tl.gather`
hands each thread the taps of one channel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from czm_fused.ops.step.spec import DESCRIPTOR_FIELDS, FIELD, HYPERPARAMETER_NAMES
from czm_fused.ops.step.triton_rule import filter_rule, hyperparameters
from czm_fused.ops.triton_utils import multiple, read

# What a row says of its filters beside the fields of a descriptor, see `triton.py`.
TILE_FIELDS = ("channels", "tile_channels", "tiles", "reciprocal")
# The quotient of a number below 1024 by d, rounded down, is number * ceil(2**20 / d) >> 20.
RECIPROCAL_BITS = 20

_ROW_COLUMNS = tl.constexpr(len(DESCRIPTOR_FIELDS) + len(TILE_FIELDS))
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
_CHANNELS = tl.constexpr(len(DESCRIPTOR_FIELDS) + TILE_FIELDS.index("channels"))
_TILE_CHANNELS = tl.constexpr(len(DESCRIPTOR_FIELDS) + TILE_FIELDS.index("tile_channels"))
_TILES = tl.constexpr(len(DESCRIPTOR_FIELDS) + TILE_FIELDS.index("tiles"))
_RECIPROCAL = tl.constexpr(len(DESCRIPTOR_FIELDS) + TILE_FIELDS.index("reciprocal"))
_RECIPROCAL_BITS = tl.constexpr(RECIPROCAL_BITS)

_GROUP_COLUMNS = tl.constexpr(len(HYPERPARAMETER_NAMES))


class _Filter(NamedTuple):
    weight: tl.tensor  # addresses
    grad: tl.tensor
    momentum: tl.tensor  # 0 without momentum
    remainder: tl.tensor  # 0 without SPLIT
    numel: tl.tensor
    taps: tl.tensor
    channels: tl.tensor
    channels_last: tl.tensor
    channel_stride: tl.tensor
    tile_channels: tl.tensor
    reciprocal: tl.tensor  # of the taps, or of tile_channels where taps are outermost
    needs_norms: tl.tensor


class _Sources(NamedTuple):
    """Where the rule of a filter is read from: addresses, or 0."""

    hyper_addresses: tl.tensor
    hyper_values: tl.tensor
    step: tl.tensor
    log_scale: tl.tensor
    log_scale_momentum: tl.tensor


class _Scale(NamedTuple):
    log_scale: tl.tensor  # addresses, or 0
    momentum: tl.tensor
    g: tl.tensor
    g_momentum: tl.tensor


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
def _read_weight(
    weights, remainders, offsets, mask, REAL: tl.constexpr, SPLIT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    weight = read(weights, offsets, mask, VECTOR).to(REAL)
    if SPLIT:
        remainder = read(remainders, offsets, mask, VECTOR)
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
def _tile(filter, first, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """The tile of a filter that begins at channel `first`: offsets in the filter, and channels."""
    slots = tl.arange(0, TILE)
    outer = (slots * filter.reciprocal) >> _RECIPROCAL_BITS
    channel = tl.where(filter.channels_last, slots - outer * filter.tile_channels, outer)
    mask = (slots < filter.tile_channels * filter.taps) & (channel < filter.channels - first)
    gap = tl.where(filter.channels_last, filter.channels - filter.tile_channels, 0)
    offsets = first * filter.channel_stride + slots + outer * gap
    if VECTOR > 1:
        # True of tensors found aligned: taps, or the channels between gaps, are multiples of it.
        offsets = tl.max_contiguous(tl.multiple_of(offsets, VECTOR), VECTOR)
        mask = tl.max_constancy(mask, VECTOR)
    return offsets, mask, channel


@triton.jit
def _load(
    filter, offsets, mask, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """W, dW and m."""
    weights, remainders, grads, momenta = _pointers(filter, DTYPE, VECTOR)
    grad = read(grads, offsets, mask, VECTOR).to(REAL)
    weight = _read_weight(weights, remainders, offsets, mask, REAL, SPLIT, VECTOR)
    momentum = read(momenta, offsets, mask & (filter.momentum != 0), VECTOR).to(REAL)
    return weight, grad, momentum


@triton.jit
def _update(
    filter, offsets, mask, weight, grad, momentum, removed_mean, rule, DTYPE: tl.constexpr,
    SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store W and m; `grad` is dV before CZMG, the data gradient and the anchor's."""
    weights, remainders, _, momenta = _pointers(filter, DTYPE, VECTOR)
    grad = tl.fma(rule.decay, weight, grad - removed_mean)
    momentum = tl.fma(rule.one_minus_dampening, grad, rule.momentum * momentum)
    direction = tl.where(rule.nesterov, tl.fma(rule.momentum, momentum, grad), momentum)
    weight = tl.fma(rule.rate, direction, rule.keep * weight)
    tl.store(momenta + offsets, momentum.to(DTYPE), mask=mask & (filter.momentum != 0))
    _store_weight(weights, remainders, offsets, mask, weight, SPLIT)


@triton.jit
def _sums_over_taps(values, channel, filter, REAL: tl.constexpr, TILE: tl.constexpr):
    """For each weight of a tile the sum of `values` over the taps of its channel."""
    CHANNELS: tl.constexpr = TILE // 4
    totals = tl.zeros([TILE], REAL)
    tap_stride = tl.where(filter.channels_last, filter.tile_channels, 1)
    first = filter.taps * 0
    while first < filter.tile_channels:
        channels = (first + tl.arange(0, CHANNELS))[None, :]
        sums = tl.zeros([CHANNELS], REAL)
        tap = filter.taps * 0
        while tap < filter.taps:
            taps = (tap + tl.arange(0, 4))[:, None]
            mask = (taps < filter.taps) & (channels < filter.tile_channels)
            slots = tl.where(mask, taps * tap_stride + channels * filter.channel_stride, 0)
            found = tl.gather(values, tl.reshape(slots, [TILE]), 0)
            sums += tl.sum(tl.where(mask, tl.reshape(found, [4, CHANNELS]), 0.0), axis=0)
            tap += 4
        own = channel - first
        is_here = (own >= 0) & (own < CHANNELS)
        totals = tl.where(is_here, tl.gather(sums, tl.where(is_here, own, 0), 0), totals)
        first += CHANNELS
    return totals


@triton.jit
def _update_tile(
    filter, offsets, mask, channel, weight, grad, momentum, rule, DTYPE: tl.constexpr,
    REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    grad = tl.fma(rule.grad, grad, rule.weight * weight)
    removed_mean = tl.zeros([TILE], REAL)
    if rule.mean != 0:
        removed_mean = rule.mean * _sums_over_taps(grad, channel, filter, REAL, TILE)
    _update(filter, offsets, mask, weight, grad, momentum, removed_mean, rule, DTYPE, SPLIT, VECTOR)


@triton.jit
def _read_sources(filter, sources, grad_scale, REAL: tl.constexpr):
    """The hyperparameters and the log-scale: asked for after the weights, and needed with them."""
    hyper = hyperparameters(
        sources.hyper_addresses,
        sources.hyper_values,
        sources.step,
        filter.momentum != 0,
        grad_scale,
        REAL,
    )
    log_scale, momentum = sources.log_scale, sources.log_scale_momentum
    scale = _Scale(
        log_scale=log_scale,
        momentum=momentum,
        g=tl.load(log_scale.to(tl.pointer_type(REAL)), mask=log_scale != 0, other=0.0),
        g_momentum=tl.load(momentum.to(tl.pointer_type(REAL)), mask=momentum != 0, other=0.0),
    )
    return hyper, scale


@triton.jit
def _new_rule(filter, scale, hyper, weight_weight, grad_weight, REAL: tl.constexpr):
    """The rule of the filter, from each thread's sums over weights; updates its log-scale."""
    # Zeros where the rule does not need them.
    total_weight_weight = tl.full([], 0.0, REAL)
    total_grad_weight = tl.full([], 0.0, REAL)
    if filter.needs_norms:
        total_weight_weight = tl.sum(weight_weight, axis=0)
        total_grad_weight = tl.sum(grad_weight, axis=0)
    rule, new_g, new_g_momentum = filter_rule(
        hyper, total_weight_weight, total_grad_weight, filter.taps, scale.log_scale != 0, scale.g,
        scale.g_momentum, REAL,
    )  # fmt: skip
    # All threads have read g before the barrier of the reductions, and one writes it after that.
    tl.store(scale.log_scale.to(tl.pointer_type(REAL)), new_g, mask=scale.log_scale != 0)
    tl.store(scale.momentum.to(tl.pointer_type(REAL)), new_g_momentum, mask=scale.momentum != 0)
    return rule


@triton.jit
def _step_held(
    filter, sources, grad_scale, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Step a filter of at most TILES tiles, which registers hold."""
    held = ()
    weight_weight = tl.zeros([TILE], REAL)
    grad_weight = tl.zeros([TILE], REAL)
    for number in tl.static_range(TILES):
        offsets, mask, _ = _tile(filter, number * filter.tile_channels, TILE, VECTOR)
        held = held + (_load(filter, offsets, mask, DTYPE, REAL, SPLIT, VECTOR),)
    hyper, scale = _read_sources(filter, sources, grad_scale, REAL)
    for number in tl.static_range(TILES):
        weight, grad, _ = held[number]
        weight_weight = tl.fma(weight, weight, weight_weight)
        grad_weight = tl.fma(grad, weight, grad_weight)
    rule = _new_rule(filter, scale, hyper, weight_weight, grad_weight, REAL)
    # The compiler does not see that this is 0, so it computes addresses again, where it would keep
    # those of every tile in registers.
    zero = (rule.keep < 0).to(tl.int32)
    for number in tl.static_range(TILES):
        weight, grad, momentum = held[number]
        first = number * filter.tile_channels + zero
        offsets, mask, channel = _tile(filter, first, TILE, VECTOR)
        _update_tile(
            filter, offsets, mask, channel, weight, grad, momentum, rule, DTYPE, REAL, SPLIT,
            TILE, VECTOR,
        )  # fmt: skip


@triton.jit
def _step_streamed(
    filter, sources, grad_scale, DTYPE: tl.constexpr, REAL: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Step a filter of any size, which is read twice."""
    hyper, scale = _read_sources(filter, sources, grad_scale, REAL)
    weights, remainders, grads, _ = _pointers(filter, DTYPE, VECTOR)
    weight_weight = tl.zeros([TILE], REAL)
    grad_weight = tl.zeros([TILE], REAL)
    end = multiple(tl.where(filter.needs_norms, filter.numel, 0), VECTOR)
    begin = end * 0
    while begin < end:
        offsets = begin + tl.arange(0, TILE)
        mask = offsets < end
        weight = _read_weight(weights, remainders, offsets, mask, REAL, SPLIT, VECTOR)
        grad = read(grads, offsets, mask, VECTOR).to(REAL)
        weight_weight = tl.fma(weight, weight, weight_weight)
        grad_weight = tl.fma(grad, weight, grad_weight)
        begin += TILE
    rule = _new_rule(filter, scale, hyper, weight_weight, grad_weight, REAL)

    first = filter.channels * 0
    if filter.tile_channels == 0:
        if VECTOR == 1:
            _update_wide(filter, rule, DTYPE, REAL, SPLIT, TILE)
        first = filter.channels
    while first < filter.channels:
        offsets, mask, channel = _tile(filter, first, TILE, VECTOR)
        weight, grad, momentum = _load(filter, offsets, mask, DTYPE, REAL, SPLIT, VECTOR)
        _update_tile(
            filter, offsets, mask, channel, weight, grad, momentum, rule, DTYPE, REAL, SPLIT,
            TILE, VECTOR,
        )  # fmt: skip
        first += filter.tile_channels


@triton.jit
def _update_wide(
    filter, rule, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr
):
    """Update a filter whose channels have more taps than a tile has room for."""
    stride = tl.where(filter.channels_last, filter.channels, 1)
    channel = filter.channels * 0
    while channel < filter.channels:
        sums = tl.zeros([TILE], REAL)
        tap = filter.taps * 0
        while tap < filter.taps:
            taps = tap + tl.arange(0, TILE)
            offsets = channel * filter.channel_stride + taps * stride
            weight, grad, _ = _load(filter, offsets, taps < filter.taps, DTYPE, REAL, SPLIT, 1)
            sums += tl.fma(rule.grad, grad, rule.weight * weight)
            tap += TILE
        # All threads have read the channel before the barrier of the sum, and write it after that.
        removed_mean = rule.mean * tl.sum(sums, axis=0)
        tap = filter.taps * 0
        while tap < filter.taps:
            taps = tap + tl.arange(0, TILE)
            mask = taps < filter.taps
            offsets = channel * filter.channel_stride + taps * stride
            weight, grad, momentum = _load(filter, offsets, mask, DTYPE, REAL, SPLIT, 1)
            grad = tl.fma(rule.grad, grad, rule.weight * weight)
            _update(
                filter, offsets, mask, weight, grad, momentum, removed_mean, rule, DTYPE, SPLIT, 1
            )
            tap += TILE
        channel += 1


@triton.jit
def _step(
    row, number, addresses, values, grad, grad_scale, found_inf, DTYPE: tl.constexpr,
    REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """Update filter `number` of the tensor that `row` describes."""
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    # A thread has TILE / threads = 4 weights of a tile, and loads at most 16 bytes at once.
    VECTOR: tl.constexpr = 4 if BYTES <= 4 else 2
    filter_numel = tl.load(row + _FILTER_NUMEL)
    begin = number * filter_numel
    numel = tl.minimum(tl.load(row + _NUMEL) - begin, filter_numel).to(tl.int32)
    momentum = tl.load(row + _MOMENTUM_BUFFER)
    remainder = tl.load(row + _PARAM_REMAINDER)
    taps = tl.load(row + _TAPS).to(tl.int32)
    channels_last = tl.load(row + _CHANNELS_LAST) != 0
    filter = _Filter(
        weight=tl.load(row + _PARAM) + begin * BYTES,
        grad=grad + begin * BYTES,
        momentum=tl.where(momentum != 0, momentum + begin * BYTES, 0),
        remainder=tl.where(remainder != 0, remainder + begin * 2, 0),
        numel=numel,
        taps=taps,
        # The last block of a plain tensor is shorter than the others.
        channels=tl.minimum(tl.load(row + _CHANNELS).to(tl.int32), numel),
        channels_last=channels_last,
        channel_stride=tl.where(channels_last, 1, taps),
        tile_channels=tl.load(row + _TILE_CHANNELS).to(tl.int32),
        reciprocal=tl.load(row + _RECIPROCAL).to(tl.int32),
        needs_norms=tl.load(row + _NEEDS_NORMS) != 0,
    )
    log_scale = tl.load(row + _LOG_SCALE)
    log_scale_momentum = tl.load(row + _LOG_SCALE_MOMENTUM_BUFFER)
    scale_begin = number * (REAL.primitive_bitwidth // 8)
    sources = _Sources(
        hyper_addresses=addresses,
        hyper_values=values,
        step=tl.load(row + _STEP),
        log_scale=tl.where(log_scale != 0, log_scale + scale_begin, 0),
        log_scale_momentum=tl.where(log_scale_momentum != 0, log_scale_momentum + scale_begin, 0),
    )

    tiles = tl.load(row + _TILES)
    aligned = (filter.weight | filter.grad | filter.momentum | filter.remainder) % (
        VECTOR * BYTES
    ) == 0
    row_numel = tl.where(channels_last, filter.channels, numel)
    aligned = aligned & (row_numel % VECTOR == 0) & (filter.tile_channels > 0)
    # Everything above has been asked for before the first of it is needed.
    is_stepped = grad != 0
    if found_inf is not None:
        is_stepped = is_stepped & (tl.load(found_inf) == 0)
    if is_stepped:
        if not aligned:
            _step_streamed(filter, sources, grad_scale, DTYPE, REAL, SPLIT, TILE, 1)
        elif tiles <= FEW:
            _step_held(filter, sources, grad_scale, DTYPE, REAL, SPLIT, TILE, FEW, VECTOR)
        elif tiles <= MANY:
            _step_held(filter, sources, grad_scale, DTYPE, REAL, SPLIT, TILE, MANY, VECTOR)
        else:
            _step_streamed(filter, sources, grad_scale, DTYPE, REAL, SPLIT, TILE, VECTOR)


@triton.jit(
    do_not_specialize=["row_count", "group_count", "first_program"],
    do_not_specialize_on_alignment=["rows", "arguments", "grad_scale", "found_inf"],
)  # fmt: skip
def step_kernel(
    rows, arguments, row_count, group_count, first_program, grad_scale, found_inf,
    DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Update the filter, or the block of a plain tensor, that this program owns.

    Args:
        rows: the descriptors and `TILE_FIELDS` of all tensors, int64, (row_count, columns); then
            the row of each program.
        arguments: int64: the address of each row's gradient; for each group's hyperparameters the
            address of a float32 that stands for it, or 0; their values as float64; as float32.
        first_program: the number of this launch's first program.
        grad_scale: what gradients are divided by, float32, or None.
        found_inf: nothing is updated where it is not 0, float32, or None.
        DTYPE: of parameters, gradients and momentum.
        REAL: of the arithmetic and of the log-scales.
        SPLIT: whether the parameters are the rounding of float32 weights, and have remainders.
        TILE: the weights of a tile, four for each thread.
        FEW, MANY: the tiles of the filters that registers hold.
    """
    program = first_program + tl.program_id(0)
    row_number = tl.load(rows + row_count * _ROW_COLUMNS + program)
    row = rows + row_number * _ROW_COLUMNS
    grad = tl.load(arguments + row_number)
    number = program - tl.load(row + _FIRST_FILTER)
    group = tl.load(row + _GROUP) * _GROUP_COLUMNS
    addresses = arguments + row_count
    values = addresses + group_count * _GROUP_COLUMNS
    if REAL == tl.float32:
        # Not every device has float64, so a float32 kernel has no instruction of it.
        values += group_count * _GROUP_COLUMNS
    values = values.to(tl.pointer_type(REAL), bitcast=True) + group
    _step(
        row, number, addresses + group, values, grad, grad_scale, found_inf, DTYPE, REAL, SPLIT,
        TILE, FEW, MANY,
    )  # fmt: skip
