"""Tensors in every layout, in memory full of NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.problem import strides

LAYOUTS = ("contiguous", "channels_last", "sliced")


def laid_out(values: Tensor, layout: str, offset: int = 0) -> Tensor:
    """Return `values` in a layout of `LAYOUTS`, `offset` elements off an aligned address."""
    shape, step = values.shape, 1
    if layout == "sliced":
        layout, step = "contiguous", 2
    elif len(shape) < 2:
        layout = "contiguous"
    its_strides = [step * stride for stride in strides(shape, layout)]
    memory = torch.full((step * values.numel() + 2 * offset + 8,), math.nan, dtype=values.dtype)
    return memory.as_strided(shape, its_strides, offset).copy_(values)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch.empty fill its memory with NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
