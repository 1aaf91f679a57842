"""The operator relu(x + residual) * u, its gradient, and their statement in plain torch.

u > 0, so relu((x + residual) * u) is the same number, and the sign of the output is the mask of the
ReLU: the gradient needs the output and u, and nothing else. u is a constant: it gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from czm_fused.ops.backends import choose
from czm_fused.ops.layout import dense, with_layout_of
from czm_fused.ops.library import lib

lib.define("add_relu_noise(Tensor x, Tensor? residual, Tensor? noise) -> Tensor")
lib.define("add_relu_noise_backward(Tensor grad, Tensor output, Tensor? noise) -> Tensor")


def _broadcast(noise: Tensor, dim: int) -> Tensor:
    return noise.view(*noise.shape, *[1] * (dim - 2))


def reference(x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
    """Compute the operator in plain torch; autograd saves its output and `noise`, and no more.

    Args:
        x: the activation, of shape (N, C, ...).
        residual: what is added to it, of the same shape and dtype, or None.
        noise: u, positive, of shape (N, C), in float32 (float64 for float64 activations), or None.
    """
    if noise is None:
        return torch.relu(x if residual is None else x + residual)
    # Half types are rounded once, after the product.
    total = x.to(noise.dtype)
    if residual is not None:
        total = total + residual
    return torch.relu((total * _broadcast(noise, x.dim())).to(x.dtype))


def reference_backward(grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    """Compute the gradient of `x` and of `residual`, which is the same, in plain torch."""
    if noise is not None:
        grad = (grad * _broadcast(noise, grad.dim())).to(output.dtype)
    return torch.where(output <= 0, 0, grad)


@torch.library.impl(lib, "add_relu_noise", "CompositeExplicitAutograd")
def fallback(x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
    """Run the operator on devices without a native kernel."""
    if choose(x.device) == "triton":
        from czm_fused.ops.triton import add_relu_noise as kernels

        return kernels.add_relu_noise(x, residual, noise)
    return with_layout_of(reference(x, residual, noise), dense(x))


@torch.library.impl(lib, "add_relu_noise_backward", "CompositeExplicitAutograd")
def fallback_backward(grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    """Run the gradient operator on devices without a native kernel."""
    if choose(output.device) == "triton":
        from czm_fused.ops.triton import add_relu_noise as kernels

        return kernels.add_relu_noise_backward(grad, output, noise)
    return with_layout_of(reference_backward(grad, output, noise), dense(output))


@torch.library.register_fake("czm_fused::add_relu_noise", lib=lib)
def _forward_fake(x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
    return torch.empty_like(dense(x))


@torch.library.register_fake("czm_fused::add_relu_noise_backward", lib=lib)
def _backward_fake(grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    return torch.empty_like(dense(output))


class AddReluNoise(torch.autograd.Function):
    """The operator with its gradient; called directly, it costs one trip through Python less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.czm_fused.add_relu_noise.default(x, residual, noise)
        ctx.save_for_backward(output, noise)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        output, noise = ctx.saved_tensors
        grad = AddReluNoiseBackward.apply(grad, output, noise)
        return grad, grad if ctx.needs_input_grad[1] else None, None


class AddReluNoiseBackward(torch.autograd.Function):
    """The gradient operator, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
        ctx.save_for_backward(output, noise)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.czm_fused.add_relu_noise_backward.default(grad, output, noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Linear in grad and diagonal, so its own transpose.
        return AddReluNoiseBackward.apply(grad, *ctx.saved_tensors), None, None


lib.impl("add_relu_noise", AddReluNoise.apply, "Autograd")
lib.impl("add_relu_noise_backward", AddReluNoiseBackward.apply, "Autograd")
