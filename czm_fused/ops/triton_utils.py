"""What Triton kernels and their launches have in common."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from czm_fused.ops.step.spec import compute_dtype

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def real_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of the arithmetic on tensors of `dtype`."""
    return TRITON_DTYPES[compute_dtype(dtype)]


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the one that Triton launches on."""
    if device.index is None:
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


@triton.jit
def multiple(number, VECTOR: tl.constexpr):
    """Return `number`, a multiple of VECTOR, so that the compiler sees that it is one."""
    # No hint: those mark the number itself, for the code that knows it unaligned as well.
    return number // VECTOR * VECTOR


@triton.jit
def read(pointer, offsets, mask, VECTOR: tl.constexpr):
    """Return the elements at `offsets`, those masked as 0.

    Args:
        VECTOR: how many elements of a thread follow one another and are aligned as a whole.
    """
    if VECTOR == 1:
        # The compiler gives all loads of one shape the layout of the widest, where neighbouring
        # threads do not read neighbouring elements. So these have a shape of their own.
        values = tl.load(pointer + offsets[:, None], mask=mask[:, None], other=0)
        return tl.reshape(values, offsets.shape)
    else:
        return tl.load(pointer + offsets, mask=mask, other=0)
