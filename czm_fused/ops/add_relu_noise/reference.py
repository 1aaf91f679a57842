"""relu(x + residual) * u and its gradient in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_relu_noise(x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
    """Compute relu(x + residual) * u; autograd saves the result and `noise`, and no more.

    Args:
        x: the activation, of shape (N, C, ...).
        residual: the tensor to add, of the same shape and dtype, or None.
        noise: u, positive, of shape (N, C), in float32 (float64 for float64 activations), or None.
    """
    if noise is None:
        return torch.relu(x if residual is None else x + residual)
    # Half types are rounded once, after the product.
    total = x.to(noise.dtype)
    if residual is not None:
        total = total + residual
    return torch.relu((total * _broadcast(noise, x.dim())).to(x.dtype))


def add_relu_noise_backward(grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    """Compute the gradient of `x` and of `residual`, which is the same."""
    if noise is not None:
        grad = (grad * _broadcast(noise, grad.dim())).to(output.dtype)
    return torch.where(output <= 0, 0, grad)


def _broadcast(noise: Tensor, dim: int) -> Tensor:
    return noise.view(*noise.shape, *[1] * (dim - 2))
