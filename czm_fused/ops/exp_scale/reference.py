"""W[f] = exp(g[f]) * V[f] (paper section 3.1) and its gradients in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def exp_scale(direction: Tensor, log_scale: Tensor) -> Tensor:
    """Compute exp(g) * V, differentiable.

    Args:
        direction: V, of shape (filters, ...).
        log_scale: g, of shape (filters,), of any floating-point dtype.
    """
    return (_scale(direction, log_scale) * direction).to(direction.dtype)


def exp_scale_backward(grad: Tensor, direction: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute dV = exp(g) * dW and dg = exp(g) * <dW, V>, differentiable."""
    scale = _scale(direction, log_scale)
    # The scale comes after the sum, so that every backend overflows at the same inputs.
    inner = _sum_over_filter(grad.to(scale.dtype) * direction)
    return (scale * grad).to(direction.dtype), (scale.flatten() * inner).to(log_scale.dtype)


def exp_scale_double_backward(
    grad_of_direction: Tensor,
    grad_of_log_scale: Tensor,
    grad: Tensor,
    direction: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of dW, V and g from those of dV and dg."""
    scale = _scale(direction, log_scale)
    weight = _per_filter(grad_of_log_scale, direction)
    grad_of_grad = scale * (grad_of_direction + weight * direction)
    return (
        grad_of_grad.to(grad.dtype),
        (scale * weight * grad).to(direction.dtype),
        _sum_over_filter(grad_of_grad * grad).to(log_scale.dtype),
    )


def _per_filter(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _sum_over_filter(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1).flatten(1).sum(1)


def _scale(direction: Tensor, log_scale: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(direction.dtype, torch.float32)
    return _per_filter(log_scale.to(compute_dtype).exp(), direction)
