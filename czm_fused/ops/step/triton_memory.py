"""How the Triton kernel moves the weights, gradients and momentum of a filter."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from czm_fused.ops.triton_utils import read


@triton.jit
def pointer(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The elements at an address, of which VECTOR are aligned as a whole."""
    return tl.multiple_of(
        address.to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8
    )


@triton.jit
def grad_pointer(sources, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The gradients of a filter. Waits for their address, so weights are asked for before."""
    begin = sources.first * (DTYPE.primitive_bitwidth // 8)
    return pointer(tl.load(sources.grads + sources.tensor) + begin, DTYPE, VECTOR)


@triton.jit
def read_weight(
    filter, offsets, mask, DTYPE: tl.constexpr, REAL: tl.constexpr, SPLIT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The weights of a tile, with SPLIT the float32 ones."""
    weight = read(pointer(filter.weight, DTYPE, VECTOR), offsets, mask, VECTOR).to(REAL)
    if SPLIT:
        remainder = read(pointer(filter.remainder, tl.int16, VECTOR), offsets, mask, VECTOR)
        remainder = tl.where((weight == 0) & (remainder < 0), 0, remainder)
        weight = (weight.to(tl.int32, bitcast=True) + remainder).to(tl.float32, bitcast=True)
    return weight


@triton.jit
def read_momentum(
    filter, offsets, mask, DTYPE: tl.constexpr, REAL: tl.constexpr, VECTOR: tl.constexpr
):
    """The momentum of a tile; zeros without momentum."""
    momenta = pointer(filter.momentum, DTYPE, VECTOR)
    return read(momenta, offsets, mask & (filter.momentum != 0), VECTOR).to(REAL)


@triton.jit
def store_weight(
    filter, offsets, mask, weight, DTYPE: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr
):
    """Store the weights of a tile, rounded, and with SPLIT what rounding took."""
    param = weight.to(DTYPE)
    tl.store(pointer(filter.weight, DTYPE, VECTOR) + offsets, param, mask=mask)
    if SPLIT:
        rounded = param.to(tl.float32).to(tl.int32, bitcast=True)
        apart = weight.to(tl.int32, bitcast=True) - rounded
        remainder = tl.minimum(tl.maximum(apart, -(2**15)), 2**15 - 1).to(tl.int16)
        remainders = pointer(filter.remainder, tl.int16, VECTOR)
        tl.store(remainders + offsets, remainder, mask=mask)
