"""The two dense memory layouts that the operators on whole tensors read and write."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if it is contiguous or channels-last, else a contiguous copy.

    Channels-last is dense in the order (0, 2, 3, ..., 1), for any number of dimensions.
    """
    if tensor.is_contiguous():
        return tensor
    if tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous():
        return tensor
    return tensor.contiguous()


def with_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` itself if it has the strides of the dense `like`, else a copy that does."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
