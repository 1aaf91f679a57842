"""The operator W[f] = exp(g[f]) * V[f] (paper section 3.1), its gradient, and their statements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from czm_fused.ops.backends import choose
from czm_fused.ops.layout import dense, with_layout_of
from czm_fused.ops.library import lib

lib.define("exp_scale(Tensor direction, Tensor log_scale) -> Tensor")
lib.define(
    "exp_scale_backward(Tensor grad, Tensor direction, Tensor log_scale) -> (Tensor, Tensor)"
)


def _per_filter(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _sum_over_filter(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1).flatten(1).sum(1)


def _scale(direction: Tensor, log_scale: Tensor) -> Tensor:
    arithmetic = torch.promote_types(direction.dtype, torch.float32)
    return _per_filter(log_scale.to(arithmetic).exp(), direction)


def reference(direction: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the operator in plain torch, differentiable.

    Args:
        direction: V, of shape (filters, ...).
        log_scale: g, of shape (filters,), of any floating-point dtype.
    """
    return (_scale(direction, log_scale) * direction).to(direction.dtype)


def reference_backward(grad: Tensor, direction: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute dV = exp(g) * dW and dg = exp(g) * <dW, V>, in plain torch, differentiable."""
    scaled = _scale(direction, log_scale) * grad
    grad_log_scale = _sum_over_filter(scaled * direction)
    return scaled.to(direction.dtype), grad_log_scale.to(log_scale.dtype)


@torch.library.impl(lib, "exp_scale", "CompositeExplicitAutograd")
def fallback(direction: Tensor, log_scale: Tensor) -> Tensor:
    """Run the operator on devices without a native kernel."""
    if choose(direction.device) == "triton":
        from czm_fused.ops.triton import exp_scale as kernels

        return kernels.exp_scale(direction, log_scale)
    return with_layout_of(reference(direction, log_scale), dense(direction))


@torch.library.impl(lib, "exp_scale_backward", "CompositeExplicitAutograd")
def fallback_backward(grad: Tensor, direction: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Run the gradient operator on devices without a native kernel."""
    if choose(direction.device) == "triton":
        from czm_fused.ops.triton import exp_scale as kernels

        return kernels.exp_scale_backward(grad, direction, log_scale)
    grad_direction, grad_log_scale = reference_backward(grad, direction, log_scale)
    return with_layout_of(grad_direction, dense(direction)), grad_log_scale


@torch.library.register_fake("czm_fused::exp_scale", lib=lib)
def _forward_fake(direction: Tensor, log_scale: Tensor) -> Tensor:
    return torch.empty_like(dense(direction))


@torch.library.register_fake("czm_fused::exp_scale_backward", lib=lib)
def _backward_fake(grad: Tensor, direction: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(direction)), torch.empty_like(log_scale.contiguous())


class ExpScale(torch.autograd.Function):
    """The operator with its gradient; called directly, it costs one trip through Python less."""

    @staticmethod
    def forward(ctx: Any, direction: Tensor, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(direction, log_scale)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.czm_fused.exp_scale.default(direction, log_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return ExpScaleBackward.apply(grad, *ctx.saved_tensors)


class ExpScaleBackward(torch.autograd.Function):
    """The gradient operator, differentiable any number of times; its gradient is plain torch."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, direction: Tensor, log_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad, direction, log_scale)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.czm_fused.exp_scale_backward.default(grad, direction, log_scale)

    @staticmethod
    def backward(
        ctx: Any, grad_of_direction: Tensor, grad_of_log_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, direction, log_scale = ctx.saved_tensors
        scale = _scale(direction, log_scale)
        weight = _per_filter(grad_of_log_scale, direction)
        grad_of_grad = scale * (grad_of_direction + weight * direction)
        return (
            grad_of_grad.to(grad.dtype),
            (scale * weight * grad).to(direction.dtype),
            _sum_over_filter(grad_of_grad * grad).to(log_scale.dtype),
        )


lib.impl("exp_scale", ExpScale.apply, "Autograd")
lib.impl("exp_scale_backward", ExpScaleBackward.apply, "Autograd")
