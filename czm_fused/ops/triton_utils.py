"""What every Triton launch needs to know of a device and of a dtype."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import contextlib

import torch
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
