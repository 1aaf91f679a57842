"""The operator W[f] = exp(g[f]) * V[f] (paper section 3.1) and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from czm_fused.ops.exp_scale import reference
from czm_fused.ops.layout import to_contiguous_or_channels_last
from czm_fused.ops.registry import Operator


def _fake(direction: Tensor, log_scale: Tensor) -> Tensor:
    return torch.empty_like(to_contiguous_or_channels_last(direction))


def _fake_backward(grad: Tensor, direction: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(direction, log_scale), torch.empty_like(log_scale.contiguous())


exp_scale = Operator(
    "exp_scale(Tensor direction, Tensor log_scale) -> Tensor",
    reference=reference.exp_scale,
    fake=_fake,
    triton=f"{__name__}.triton",
)
exp_scale_backward = Operator(
    "exp_scale_backward(Tensor grad, Tensor direction, Tensor log_scale) -> (Tensor, Tensor)",
    reference=reference.exp_scale_backward,
    fake=_fake_backward,
    triton=f"{__name__}.triton",
)


def _gradient(needed: Any, saved: tuple[Tensor, Tensor], grad: Tensor) -> Any:
    return exp_scale_backward.apply(grad, *saved)


def _gradient_of_gradient(
    needed: Any, saved: tuple[Tensor, Tensor, Tensor], grad_direction: Tensor, grad_scale: Tensor
) -> Any:
    return reference.exp_scale_double_backward(grad_direction, grad_scale, *saved)


exp_scale.register_gradient(lambda args, result: args, _gradient)
exp_scale_backward.register_gradient(lambda args, result: args, _gradient_of_gradient)
