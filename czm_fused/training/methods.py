"""What the methods are: the network and the optimizer that each one trains with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..groups import czm_param_groups
from ..init import GAIN, check_gain, czm_weight_, named_convolutions
from ..models import CIFARResNet, cifar_resnet
from ..optim import FusedCZMSGD
from .settings import Settings

_NORMS = {"czmig": "czm", "czmi": "czm", "bn": "bn", "plain": "none"}


def uses_czm(settings: Settings) -> bool:
    """Return whether the method trains zero-mean convolutions with `FusedCZMSGD`."""
    return _NORMS[settings.method] == "czm"


def build_model(settings: Settings, *, in_channels: int, num_classes: int) -> nn.Module:
    """Return the method's network, initialised from torch's default generator."""
    model = cifar_resnet(
        settings.depth,
        norm=_NORMS[settings.method],
        noise=settings.noise,
        noise_on=settings.noise_on,
        in_channels=in_channels,
        num_classes=num_classes,
        residual_bias=settings.residual_bias,
    )
    if uses_czm(settings):
        _initialise(settings, model)
    return model


@torch.no_grad()
def _initialise(settings: Settings, model: CIFARResNet) -> None:
    check_gain(settings.gain)
    if settings.stem == "zero-mean":
        czm_weight_(model.stem.weight)
    if settings.gain != GAIN:
        for convolution in named_convolutions(model).values():
            convolution.weight.mul_(settings.gain / GAIN)


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Return the method's optimizer: `FusedCZMSGD`, or for BatchNorm and the plain net torch's SGD.

    The first group holds filters, at the learning rate `lr`.
    """
    if not uses_czm(settings):
        return torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    head_lr = settings.lr if settings.head_lr is None else settings.head_lr
    stem: dict[str, Any] = {
        "scaled": {},
        "zero-mean": {"zmg": settings.zmg},
        "plain": {"exp_scale": False, "luma": 0.0},
    }[settings.stem]
    rest = {"lr": head_lr, "luma": settings.classifier_luma}
    groups = czm_param_groups(model, overrides={"stem": stem, "rest": rest})
    return FusedCZMSGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        zmg=settings.zmg,
        luma=settings.luma,
        backend=settings.backend,
    )


@torch.no_grad()
def direction_norms(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm ‖V‖ of every convolution filter of `model`, `(filters,)`.

    Without exp-scaling, V is the weight itself.
    """
    norms = []
    for parameter in model.parameters():
        if parameter.dim() < 3:
            continue
        weight_norms = torch.linalg.vector_norm(parameter.flatten(1), dim=1)
        log_scale = optimizer.state.get(parameter, {}).get("log_scale")
        norms.append(weight_norms if log_scale is None else weight_norms / log_scale.exp())
    return torch.cat(norms)
