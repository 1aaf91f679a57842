"""The precision of float32 products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Let convolutions and matrix products of float32 run in TF32, or insist that they do not.

    torch itself leaves convolutions in TF32 and matrix products not.

    Args:
        tf32: True lets NVIDIA GPUs round the factors to 10 bits; sums stay float32.
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, torch.get_float32_matmul_precision()
    convolutions.fp32_precision = "tf32" if tf32 else "ieee"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        convolutions.fp32_precision = before[0]
        torch.set_float32_matmul_precision(before[1])
