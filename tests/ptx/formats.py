"""The types of PTX, as numpy has them, and the rounding of what numpy does not have."""

from __future__ import annotations

import numpy as np

BITS = {f"{kind}{width}": width for kind in "bsuf" for width in (8, 16, 32, 64)}
BITS |= {"pred": 1, "bf16": 16, "b128": 128}
BITS |= {"s16x2": 32, "u16x2": 32, "f16x2": 32, "bf16x2": 32}

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

_BF16_NAN = np.uint32(0x7FFF)


def is_float(kind: str) -> bool:
    """Return True for the floating-point types of one number."""
    return kind in ("f16", "f32", "f64", "bf16")


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return the numbers of type `kind` that unsigned integers of its width encode."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if is_float(kind):
        return bits.view(FLOAT[BITS[kind]])
    return bits.view(SIGNED[BITS[kind]]) if kind[0] == "s" else bits


def to_bits(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Return the encoding of `numbers` as type `kind`, as unsigned integers of its width."""
    if kind == "bf16":
        bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        return np.where(np.isnan(numbers), _BF16_NAN, rounded).astype(np.uint16)
    width = BITS[kind]
    if is_float(kind):
        return np.ascontiguousarray(numbers, dtype=FLOAT[width]).view(UNSIGNED[width])
    if kind[0] == "s":
        return numbers.astype(SIGNED[width], copy=False).view(UNSIGNED[width])
    return numbers.astype(UNSIGNED[width], copy=False)


def flush_subnormals(numbers: np.ndarray) -> np.ndarray:
    """Return float32 `numbers` with subnormals as zeros of their sign; others as they are."""
    if numbers.dtype != np.float32:
        return numbers
    smallest = np.float32(2.0**-126)
    zeros = np.copysign(np.float32(0), numbers)
    return np.where(np.abs(numbers) < smallest, zeros, numbers).astype(np.float32)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded once (for float64: as exact as the host's long double)."""
    wide = np.float64 if a.dtype == np.float16 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)
