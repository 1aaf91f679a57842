"""The two memory layouts that the operators on whole tensors read and write."""

from __future__ import annotations

import torch
from torch import Tensor


def is_contiguous_or_channels_last(tensor: Tensor) -> bool:
    """Return True if `tensor` is contiguous in its own order of dimensions or in (0, 2, ..., 1)."""
    if tensor.is_contiguous():
        return True
    return tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous()


def to_contiguous_or_channels_last(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if it is contiguous or channels-last, else a contiguous copy."""
    return tensor if is_contiguous_or_channels_last(tensor) else tensor.contiguous()


def to_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` itself if it has the strides of `like`, else a copy that does.

    `like` is non-overlapping and dense, and has the shape of `tensor`.
    """
    if tensor.stride() == like.stride():
        return tensor
    copy = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)
