"""The operator relu(x + residual) * u and its gradient.

u > 0, so relu((x + residual) * u) is the same number, and the sign of the output is the mask of the
ReLU: the gradient needs the output and u, and nothing else. u is a constant: it gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from czm_fused.ops.add_relu_noise import reference
from czm_fused.ops.layout import to_contiguous_or_channels_last
from czm_fused.ops.registry import Operator


def _fake(x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
    return torch.empty_like(to_contiguous_or_channels_last(x))


def _fake_backward(grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    return torch.empty_like(to_contiguous_or_channels_last(output))


add_relu_noise = Operator(
    "add_relu_noise(Tensor x, Tensor? residual, Tensor? noise) -> Tensor",
    reference=reference.add_relu_noise,
    fake=_fake,
    triton=f"{__name__}.triton",
)
add_relu_noise_backward = Operator(
    "add_relu_noise_backward(Tensor grad, Tensor output, Tensor? noise) -> Tensor",
    reference=reference.add_relu_noise_backward,
    fake=_fake_backward,
    triton=f"{__name__}.triton",
)


def _gradient(needed: Any, saved: tuple[Tensor, Tensor | None], grad: Tensor) -> Any:
    grad = add_relu_noise_backward.apply(grad, *saved)
    return grad, grad if needed[1] else None, None


def _gradient_of_gradient(needed: Any, saved: tuple[Tensor, Tensor | None], grad: Tensor) -> Any:
    # The gradient is linear in grad and diagonal, so it is its own transpose.
    return add_relu_noise_backward.apply(grad, *saved), None, None


add_relu_noise.register_gradient(lambda args, output: (output, args[2]), _gradient)
add_relu_noise_backward.register_gradient(lambda args, result: args[1:], _gradient_of_gradient)
