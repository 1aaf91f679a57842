"""The tensors of a model, without the model: shapes, weights and gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NAMED = ("resnet110", "resnet50", "vgg16")
MODELS = (*NAMED, "vgg16_features")


def parameter_shapes(model: str) -> list[torch.Size]:
    """Return the shapes of the parameters of one of `MODELS`, in their order.

    Raises:
        ImportError: torchvision is not installed, and the model is one of its.
    """
    return [parameter.shape for parameter in _build(model).parameters()]


def make_weights(
    shapes: list[torch.Size], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> list[Tensor]:
    """Draw weights whose filters have norms of about 0.8, as at the start of a training."""
    return [_randn(shape, generator, dtype, device) for shape in shapes]


def make_grads(
    shapes: list[torch.Size], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> list[Tensor]:
    """Draw gradients of the weights' size; half of a slice is its mean, so that CZMG shows."""
    grads = []
    for shape in shapes:
        grad = _randn(shape, generator, dtype, device)
        if len(shape) > 2:
            slices = torch.Size((*shape[:2], *(1 for _ in shape[2:])))
            fan_in = math.prod(shape[1:])
            means = torch.randn(slices, generator=generator).mul_(0.8 / math.sqrt(fan_in))
            grad += means.to(device=device, dtype=dtype)
        grads.append(grad.mul_(0.5))
    return grads


def _build(model: str) -> nn.Module:
    if model == "resnet110":
        from czm_fused.models import cifar_resnet

        return cifar_resnet(110, residual_bias=True)
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(
            f"the shapes of {model} come from torchvision: pip install czm-fused[train]"
        ) from error
    with torch.device("meta"):
        if model == "vgg16_features":
            return torchvision.models.vgg16().features
        return getattr(torchvision.models, model)()


def _randn(
    shape: torch.Size, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Tensor:
    fan_in = max(math.prod(shape[1:]), 10)
    values = torch.randn(shape, generator=generator).mul_(0.8 / math.sqrt(fan_in))
    return values.to(device=device, dtype=dtype)
