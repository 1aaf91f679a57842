"""The kernel of the fused step: one program updates one filter, or one block of a plain tensor.

A filter is taken in tiles of TILE weights, each the taps of `tile_channels` channels. A filter of a
few tiles is loaded as a whole, W, dW and m at once, and held in registers until it is stored: each
weight is read once. A longer one is read twice, for the sums over it, then for the update, and dW
once more for `grad_norm`.

A program reads what it does from one work item, and waits for nothing else before it asks for its
first weights: the gradient's address and the hyperparameters follow, and what a GradScaler has
found decides no more than whether anything is written.

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

from czm_fused.ops.step.spec import ADDRESSES, HYPERPARAMETER_NAMES
from czm_fused.ops.step.triton_memory import (
    grad_pointer,
    pointer,
    read_momentum,
    read_weight,
    store_weight,
)
from czm_fused.ops.step.triton_rule import FilterSums, filter_rule, hyperparameters
from czm_fused.ops.triton_utils import multiple, read

# A work item says what one program does: int64 fields, then int32 fields. See `triton.py`.
WIDE_FIELDS = (*ADDRESSES, "first")
FIELDS = (
    "numel", "taps", "channels", "channels_last", "tile_channels", "reciprocal", "needs_sums",
    "path", "tensor", "group",
)  # fmt: skip
# How a filter is stepped: read twice, one element at a time or in vectors; or held in registers.
STREAMED, STREAMED_VECTORS, HELD_FEW, HELD_MANY = range(4)
# The quotient of a number below 1024 by d, rounded down, is number * ceil(2**20 / d) >> 20.
RECIPROCAL_BITS = 20

_STREAMED = tl.constexpr(STREAMED)
_HELD_FEW = tl.constexpr(HELD_FEW)
_HELD_MANY = tl.constexpr(HELD_MANY)
_RECIPROCAL_BITS = tl.constexpr(RECIPROCAL_BITS)

_WIDE_FIELDS = tl.constexpr(len(WIDE_FIELDS))
_ITEM_WORDS = tl.constexpr(len(WIDE_FIELDS) + len(FIELDS) // 2)
_PARAM = tl.constexpr(WIDE_FIELDS.index("param"))
_MOMENTUM_BUFFER = tl.constexpr(WIDE_FIELDS.index("momentum_buffer"))
_LOG_SCALE = tl.constexpr(WIDE_FIELDS.index("log_scale"))
_LOG_SCALE_MOMENTUM_BUFFER = tl.constexpr(WIDE_FIELDS.index("log_scale_momentum_buffer"))
_STEP = tl.constexpr(WIDE_FIELDS.index("step"))
_PARAM_REMAINDER = tl.constexpr(WIDE_FIELDS.index("param_remainder"))
_FIRST = tl.constexpr(WIDE_FIELDS.index("first"))
_NUMEL = tl.constexpr(FIELDS.index("numel"))
_TAPS = tl.constexpr(FIELDS.index("taps"))
_CHANNELS = tl.constexpr(FIELDS.index("channels"))
_CHANNELS_LAST = tl.constexpr(FIELDS.index("channels_last"))
_TILE_CHANNELS = tl.constexpr(FIELDS.index("tile_channels"))
_RECIPROCAL = tl.constexpr(FIELDS.index("reciprocal"))
_NEEDS_SUMS = tl.constexpr(FIELDS.index("needs_sums"))
_PATH = tl.constexpr(FIELDS.index("path"))
_TENSOR = tl.constexpr(FIELDS.index("tensor"))
_GROUP = tl.constexpr(FIELDS.index("group"))

_GROUP_COLUMNS = tl.constexpr(len(HYPERPARAMETER_NAMES))


class _Filter(NamedTuple):
    weight: tl.tensor  # addresses
    momentum: tl.tensor  # 0 without momentum
    remainder: tl.tensor  # 0 without SPLIT
    numel: tl.tensor
    taps: tl.tensor
    channels: tl.tensor
    channels_last: tl.tensor
    channel_stride: tl.tensor
    tile_channels: tl.tensor
    reciprocal: tl.tensor  # of the taps, or of tile_channels where taps are outermost
    needs_sums: tl.tensor


class _Sources(NamedTuple):
    """Where all else is read from: addresses, or 0."""

    grads: tl.tensor  # where the addresses of the gradients of all tensors are
    tensor: tl.tensor
    first: tl.tensor  # weights of the tensor before the filter
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
def _update(
    filter, offsets, mask, weight, grad, momentum, removed_mean, rule, writes,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store W and m; `grad` is dV before CZMG, the data gradient and the anchor's."""
    mask = mask & writes
    grad = tl.fma(rule.decay, weight, grad - removed_mean)
    momentum = tl.fma(rule.one_minus_dampening, grad, rule.momentum * momentum)
    direction = tl.where(rule.nesterov, tl.fma(rule.momentum, momentum, grad), momentum)
    weight = tl.fma(rule.rate, direction, rule.keep * weight)
    momenta = pointer(filter.momentum, DTYPE, VECTOR)
    tl.store(momenta + offsets, momentum.to(DTYPE), mask=mask & (filter.momentum != 0))
    store_weight(filter, offsets, mask, weight, DTYPE, SPLIT, VECTOR)


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
    filter, offsets, mask, channel, weight, grad, momentum, rule, writes, DTYPE: tl.constexpr,
    REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    grad = tl.fma(rule.grad, grad, rule.weight * weight)
    removed_mean = tl.zeros([TILE], REAL)
    if rule.mean != 0:
        removed_mean = rule.mean * _sums_over_taps(grad, channel, filter, REAL, TILE)
    _update(
        filter, offsets, mask, weight, grad, momentum, removed_mean, rule, writes, DTYPE, SPLIT,
        VECTOR,
    )  # fmt: skip


@triton.jit
def _read_sources(filter, sources, grad_scale, found_inf, REAL: tl.constexpr):
    """The hyperparameters, the log-scale, and whether anything is written.

    They are asked for after the weights, and needed with them.
    """
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
    writes = tl.full([], 1, tl.int1)
    if found_inf is not None:
        # By way of an integer, since Triton's interpreter has no masks from float32.
        writes = tl.where(tl.load(found_inf) == 0, 1, 0) != 0
    return hyper, scale, writes


@triton.jit
def _totals(filter, weight_weight, grad_weight, REAL: tl.constexpr):
    """<W, W> and <dW, W>, from each thread's sums over weights."""
    # Zeros where the rule does not need them.
    total_weight_weight = tl.full([], 0.0, REAL)
    total_grad_weight = tl.full([], 0.0, REAL)
    if filter.needs_sums:
        total_weight_weight = tl.sum(weight_weight, axis=0)
        total_grad_weight = tl.sum(grad_weight, axis=0)
    return total_weight_weight, total_grad_weight


@triton.jit
def _new_rule(filter, scale, hyper, writes, sums, REAL: tl.constexpr):
    """The rule of the filter, from the sums over it; updates its log-scale."""
    rule, new_g, new_g_momentum = filter_rule(
        hyper, sums, filter.taps, scale.log_scale != 0, scale.g, scale.g_momentum, REAL
    )
    # All threads have read g before the barrier of the reductions, and one writes it after that.
    log_scales = scale.log_scale.to(tl.pointer_type(REAL))
    momenta = scale.momentum.to(tl.pointer_type(REAL))
    tl.store(log_scales, new_g, mask=writes & (scale.log_scale != 0))
    tl.store(momenta, new_g_momentum, mask=writes & (scale.momentum != 0))
    return rule


@triton.jit
def _step_held(
    filter, sources, grad_scale, found_inf, DTYPE: tl.constexpr, REAL: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Step a filter of at most TILES tiles, which registers hold."""
    held = ()
    for number in tl.static_range(TILES):
        offsets, mask, _ = _tile(filter, number * filter.tile_channels, TILE, VECTOR)
        weight = read_weight(filter, offsets, mask, DTYPE, REAL, SPLIT, VECTOR)
        momentum = read_momentum(filter, offsets, mask, DTYPE, REAL, VECTOR)
        held = held + ((weight, momentum),)
    grads = ()
    first_grad = grad_pointer(sources, DTYPE, VECTOR)
    for number in tl.static_range(TILES):
        offsets, mask, _ = _tile(filter, number * filter.tile_channels, TILE, VECTOR)
        grads = grads + (read(first_grad, offsets, mask, VECTOR).to(REAL),)
    hyper, scale, writes = _read_sources(filter, sources, grad_scale, found_inf, REAL)
    weight_weight = tl.zeros([TILE], REAL)
    grad_weight = tl.zeros([TILE], REAL)
    for number in tl.static_range(TILES):
        weight, _ = held[number]
        weight_weight = tl.fma(weight, weight, weight_weight)
        grad_weight = tl.fma(grads[number], weight, grad_weight)
    weight_weight, grad_weight = _totals(filter, weight_weight, grad_weight, REAL)
    # After the others, whose registers are free again.
    grad_grad = tl.full([], 0.0, REAL)
    if filter.needs_sums & (hyper.grad_norm > 0):
        squares = tl.zeros([TILE], REAL)
        for number in tl.static_range(TILES):
            squares = tl.fma(grads[number], grads[number], squares)
        grad_grad = tl.sum(squares, axis=0)
    sums = FilterSums(weight_weight=weight_weight, grad_weight=grad_weight, grad_grad=grad_grad)
    rule = _new_rule(filter, scale, hyper, writes, sums, REAL)
    # The compiler does not see that this is 0, so it computes addresses again, where it would keep
    # those of every tile in registers.
    zero = (rule.keep < 0).to(tl.int32)
    for number in tl.static_range(TILES):
        weight, momentum = held[number]
        first = number * filter.tile_channels + zero
        offsets, mask, channel = _tile(filter, first, TILE, VECTOR)
        _update_tile(
            filter, offsets, mask, channel, weight, grads[number], momentum, rule, writes, DTYPE,
            REAL, SPLIT, TILE, VECTOR,
        )  # fmt: skip


@triton.jit
def _step_streamed(
    filter, sources, grad_scale, found_inf, DTYPE: tl.constexpr, REAL: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Step a filter of any size, which is read twice."""
    weight_weight = tl.zeros([TILE], REAL)
    grad_weight = tl.zeros([TILE], REAL)
    # Without sums one tile: it is on its way while the update waits for hyperparameters.
    end = tl.where(filter.needs_sums, filter.numel, tl.minimum(filter.numel, TILE))
    end = multiple(end, VECTOR)
    begin = end * 0
    while begin < end:
        offsets = begin + tl.arange(0, TILE)
        mask = offsets < end
        weight = read_weight(filter, offsets, mask, DTYPE, REAL, SPLIT, VECTOR)
        grads = grad_pointer(sources, DTYPE, VECTOR)
        grad = read(grads, offsets, mask, VECTOR).to(REAL)
        weight_weight = tl.fma(weight, weight, weight_weight)
        grad_weight = tl.fma(grad, weight, grad_weight)
        begin += TILE
    hyper, scale, writes = _read_sources(filter, sources, grad_scale, found_inf, REAL)
    weight_weight, grad_weight = _totals(filter, weight_weight, grad_weight, REAL)
    # In a loop of its own, as one more sum in that above would take registers of its loads.
    squares = tl.zeros([TILE], REAL)
    begin = multiple(tl.where(hyper.grad_norm > 0, 0, end), VECTOR)
    needs_squares = begin < end
    while begin < end:
        offsets = begin + tl.arange(0, TILE)
        grads = grad_pointer(sources, DTYPE, VECTOR)
        grad = read(grads, offsets, offsets < end, VECTOR).to(REAL)
        squares = tl.fma(grad, grad, squares)
        begin += TILE
    grad_grad = tl.full([], 0.0, REAL)
    if needs_squares:
        # A selection, as one more condition of the loop would cost a stack on sm_80.
        grad_grad = tl.where(filter.needs_sums, tl.sum(squares, axis=0), 0.0)
    sums = FilterSums(weight_weight=weight_weight, grad_weight=grad_weight, grad_grad=grad_grad)
    rule = _new_rule(filter, scale, hyper, writes, sums, REAL)

    first = filter.channels * 0
    if filter.tile_channels == 0:
        if VECTOR == 1:
            grads = grad_pointer(sources, DTYPE, VECTOR)
            _update_wide(filter, grads, rule, writes, DTYPE, REAL, SPLIT, TILE)
        first = filter.channels
    while first < filter.channels:
        offsets, mask, channel = _tile(filter, first, TILE, VECTOR)
        weight = read_weight(filter, offsets, mask, DTYPE, REAL, SPLIT, VECTOR)
        grads = grad_pointer(sources, DTYPE, VECTOR)
        grad = read(grads, offsets, mask, VECTOR).to(REAL)
        momentum = read_momentum(filter, offsets, mask, DTYPE, REAL, VECTOR)
        _update_tile(
            filter, offsets, mask, channel, weight, grad, momentum, rule, writes, DTYPE, REAL,
            SPLIT, TILE, VECTOR,
        )  # fmt: skip
        first += filter.tile_channels


@triton.jit
def _update_wide(
    filter, grads, rule, writes, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Update a filter whose channels have more taps than a tile has room for."""
    stride = tl.where(filter.channels_last, filter.channels, 1)
    channel = filter.channels * 0
    while channel < filter.channels:
        sums = tl.zeros([TILE], REAL)
        tap = filter.taps * 0
        while tap < filter.taps:
            taps = tap + tl.arange(0, TILE)
            mask = taps < filter.taps
            offsets = channel * filter.channel_stride + taps * stride
            weight = read_weight(filter, offsets, mask, DTYPE, REAL, SPLIT, 1)
            grad = read(grads, offsets, mask, 1).to(REAL)
            sums += tl.fma(rule.grad, grad, rule.weight * weight)
            tap += TILE
        # All threads have read the channel before the barrier of the sum, and write it after that.
        removed_mean = rule.mean * tl.sum(sums, axis=0)
        tap = filter.taps * 0
        while tap < filter.taps:
            taps = tap + tl.arange(0, TILE)
            mask = taps < filter.taps
            offsets = channel * filter.channel_stride + taps * stride
            weight = read_weight(filter, offsets, mask, DTYPE, REAL, SPLIT, 1)
            grad = read(grads, offsets, mask, 1).to(REAL)
            momentum = read_momentum(filter, offsets, mask, DTYPE, REAL, 1)
            grad = tl.fma(rule.grad, grad, rule.weight * weight)
            _update(
                filter, offsets, mask, weight, grad, momentum, removed_mean, rule, writes, DTYPE,
                SPLIT, 1,
            )  # fmt: skip
            tap += TILE
        channel += 1


@triton.jit
def _read_item(item, grads, addresses, values):
    """The filter of a work item, where the rest is read from, and its path.

    Nothing here waits for more than the item.
    """
    fields = (item + _WIDE_FIELDS).to(tl.pointer_type(tl.int32), bitcast=True)
    taps = tl.load(fields + _TAPS)
    channels_last = tl.load(fields + _CHANNELS_LAST) != 0
    filter = _Filter(
        weight=tl.load(item + _PARAM),
        momentum=tl.load(item + _MOMENTUM_BUFFER),
        remainder=tl.load(item + _PARAM_REMAINDER),
        numel=tl.load(fields + _NUMEL),
        taps=taps,
        channels=tl.load(fields + _CHANNELS),
        channels_last=channels_last,
        channel_stride=tl.where(channels_last, 1, taps),
        tile_channels=tl.load(fields + _TILE_CHANNELS),
        reciprocal=tl.load(fields + _RECIPROCAL),
        needs_sums=tl.load(fields + _NEEDS_SUMS) != 0,
    )
    group = tl.load(fields + _GROUP) * _GROUP_COLUMNS
    sources = _Sources(
        grads=grads,
        tensor=tl.load(fields + _TENSOR),
        first=tl.load(item + _FIRST),
        hyper_addresses=addresses + group,
        hyper_values=values + group,
        step=tl.load(item + _STEP),
        log_scale=tl.load(item + _LOG_SCALE),
        log_scale_momentum=tl.load(item + _LOG_SCALE_MOMENTUM_BUFFER),
    )
    return filter, sources, tl.load(fields + _PATH)


@triton.jit(
    do_not_specialize=["tensor_count", "group_count", "first_program"],
    do_not_specialize_on_alignment=["items", "arguments", "grad_scale", "found_inf"],
)  # fmt: skip
def step_kernel(
    items, arguments, tensor_count, group_count, first_program, grad_scale, found_inf,
    DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Update the filter, or the block of a plain tensor, that this program owns.

    Args:
        items: the work item of each program, int64: `WIDE_FIELDS`, then `FIELDS` as int32.
        arguments: int64: the address of each tensor's gradient; for each group's hyperparameters
            the address of a float32 that stands for it, or 0; their values as float64; as float32.
        first_program: the number of this launch's first program.
        grad_scale: what gradients are divided by, float32, or None.
        found_inf: nothing is updated where it is not 0, float32, or None.
        DTYPE: of parameters, gradients and momentum.
        REAL: of the arithmetic and of the log-scales.
        SPLIT: whether the parameters are the rounding of float32 weights, and have remainders.
        TILE: the weights of a tile, four for each thread.
        FEW, MANY: the tiles of the filters that registers hold.
    """
    # A thread has TILE / threads = 4 weights of a tile, and loads at most 16 bytes at once.
    VECTOR: tl.constexpr = 4 if DTYPE.primitive_bitwidth <= 32 else 2
    addresses = arguments + tensor_count
    values = addresses + group_count * _GROUP_COLUMNS
    if REAL == tl.float32:
        # Not every device has float64, so a float32 kernel has no instruction of it.
        values += group_count * _GROUP_COLUMNS
    values = values.to(tl.pointer_type(REAL), bitcast=True)
    item = items + (first_program + tl.program_id(0)).to(tl.int64) * _ITEM_WORDS
    filter, sources, path = _read_item(item, arguments, addresses, values)
    # Without a gradient the item has no addresses.
    if filter.weight != 0:
        if path == _STREAMED:
            _step_streamed(filter, sources, grad_scale, found_inf, DTYPE, REAL, SPLIT, TILE, 1)
        elif path == _HELD_FEW:
            _step_held(
                filter, sources, grad_scale, found_inf, DTYPE, REAL, SPLIT, TILE, FEW, VECTOR
            )
        elif path == _HELD_MANY:
            _step_held(
                filter, sources, grad_scale, found_inf, DTYPE, REAL, SPLIT, TILE, MANY, VECTOR
            )
        else:
            _step_streamed(filter, sources, grad_scale, found_inf, DTYPE, REAL, SPLIT, TILE, VECTOR)
