"""The methods: the network and the optimizer that each one trains with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..groups import czm_param_groups
from ..init import GAIN, check_positive, czm_weight_, named_convolutions
from ..models import cifar_resnet
from ..ops.step.reference import filter_norms
from ..optim import FusedCZMSGD
from .config import Config
from .errors import TrainingError

_NORMS = {"czmig": "czm", "czmi": "czm", "bn": "bn", "plain": "none"}


def uses_czm(config: Config) -> bool:
    """Return True if the method trains zero-mean convolutions with `FusedCZMSGD`."""
    return _NORMS[config.method] == "czm"


@torch.no_grad()
def build_model(config: Config, *, in_channels: int, num_classes: int) -> nn.Module:
    """Return the method's network, initialised from torch's default generator."""
    if config.center_every and not config.residual_bias:
        raise TrainingError("--center-every acts on convolutions with a bias: add --residual-bias")
    model = cifar_resnet(
        config.depth,
        norm=_NORMS[config.method],
        noise=config.noise,
        noise_on=config.noise_on,
        in_channels=in_channels,
        num_classes=num_classes,
        residual_bias=config.residual_bias,
    )
    if uses_czm(config):
        check_positive("gain", config.gain)
        if config.stem == "zero-mean":
            czm_weight_(model.stem.weight)
        if config.gain != GAIN:
            for convolution in named_convolutions(model).values():
                convolution.weight.mul_(config.gain / GAIN)
    return model


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return the method's optimizer: `FusedCZMSGD`, or for BatchNorm and the plain net torch's SGD.

    The first group holds filters, at the learning rate `lr`.
    """
    common: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    if not uses_czm(config):
        return torch.optim.SGD(model.parameters(), **common, fused=True)
    stem: dict[str, Any] = {
        "scaled": {},
        "zero-mean": {"zmg": config.zmg},
        "plain": {"exp_scale": False, "luma": 0.0},
    }[config.stem]
    rest = {"lr": config.head_lr, "luma": config.as_dict()["classifier_luma"]}
    overrides = {"stem": stem, "rest": rest}
    if config.bias_lr is not None:
        overrides["bias"] = {**rest, "lr": config.bias_lr}
    groups = czm_param_groups(model, overrides=overrides)
    common |= {"zmg": config.zmg, "luma": config.luma, "grad_norm": config.grad_norm}
    common["backend"] = config.backend
    return FusedCZMSGD(groups, **common)


@torch.no_grad()
def direction_norms(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm ‖V‖ of every filter of three or more dimensions of `model`, `(filters,)`.

    Without exp-scaling, V is the weight itself.
    """
    norms = [torch.empty(0)]
    for parameter in model.parameters():
        if parameter.dim() >= 3:
            log_scale = optimizer.state.get(parameter, {}).get("log_scale", torch.zeros(()))
            norms.append((filter_norms(parameter) / log_scale.exp()).cpu())
    return torch.cat(norms)
