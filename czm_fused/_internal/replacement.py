"""Carry out a conversion: fold and replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from czm_fused.example import hooked, preserved, run_example, zeros_for
from czm_fused.init import CONVOLUTIONS, Convolution, named_convolutions
from czm_fused.nn import ChannelAffine, ChannelNoise, Copy, CZMConv2d, ReLU6


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value of `replacements` wherever its key is a child within `model`."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


def still_called(model: nn.Module, modules: Mapping[str, nn.Module], example: Any) -> list[str]:
    """Return the names of those of `modules` that a pass of `model` in eval mode calls.

    Args:
        model: within which they have been replaced.
        modules: by the names that they had.
        example: as `czm_fused.example.run_example` takes it; None for zeros.
    """
    if not modules:
        return []
    called = set()
    hooks = (
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in modules.items()
    )
    gone = nn.ModuleList(modules.values())
    with preserved(model), preserved(gone), hooked(hooks):
        model.eval()
        gone.eval()
        if example is None:
            example = zeros_for(model, next(iter(named_convolutions(model).values())))
        run_example(model, example)
    return [name for name in modules if name in called]


def save_outputs_alone(model: nn.Module, activations: Iterable[nn.ReLU6]) -> None:
    """Put `czm_fused.nn.ReLU6` in the place of each of `activations` within `model`."""
    replace_modules(model, {each: ReLU6(each.inplace).train(each.training) for each in activations})


def has_hooks(module: nn.Module) -> bool:
    """Return True if anything is registered to be called with the passes of `module`."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def computes_convolution(convolution: Convolution) -> bool:
    """Return True if its class computes what torch's or this package's does, of its parameters."""
    torchs = next(each for each in CONVOLUTIONS if isinstance(convolution, each))
    return (
        type(convolution).forward in (torchs.forward, CZMConv2d.forward)
        and type(convolution)._conv_forward is torchs._conv_forward
        and not {"forward", "_conv_forward"} & vars(convolution).keys()
        and {"weight", "bias"} <= convolution._parameters.keys()
    )


def add_bias(convolution: Any) -> None:
    """Give a convolution a bias of 0, unless it has one."""
    if convolution.bias is None:
        weight = convolution.weight
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        convolution.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def fold(convolution: Any, norm: Any) -> None:
    """Multiply and shift the weight and bias of `convolution` as `norm` does its output in eval."""
    factor, summand = _scale_and_shift(norm)
    with torch.no_grad():
        weight = convolution.weight
        weight.copy_(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        convolution.bias.copy_(convolution.bias * factor + summand)


def replacement_for(norm: Any, *, affine: bool, copies: bool, noise: float) -> nn.Module:
    """Return the module that takes the place of a BatchNorm.

    Args:
        norm: the BatchNorm; its children, which timm's have, stay behind what replaces it.
        affine: begin with the scale and shift of `norm` in eval mode.
        copies: the result must not share memory with the input.
        noise: half the width of the noise that multiplies each channel in training; 0 for none.
    """
    parts = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    if noise > 0:
        parts.insert(0, ChannelNoise(noise, copies=copies))
    elif copies:
        parts.insert(0, Copy())
    if affine:
        factor, summand = (each.to(norm.running_var.dtype) for each in _scale_and_shift(norm))
        scale = ChannelAffine(factor, summand)
        parts.insert(0, scale.requires_grad_(norm.affine and norm.weight.requires_grad))
    if not parts:
        return nn.Identity().train(norm.training)
    replacement = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    return replacement.train(norm.training)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand of each channel of a BatchNorm in eval mode."""
    with torch.no_grad():
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        factor = (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        summand = -norm.running_mean * factor
        if norm.bias is not None:
            summand = summand + norm.bias
        return factor, summand
