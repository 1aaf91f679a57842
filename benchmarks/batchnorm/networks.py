"""The networks, with BatchNorm and with what may take its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from czm_fused import FusedCZMSGD, convert, czm_param_groups
from czm_fused.functional import add_relu_noise, draw_noise
from czm_fused.models import cifar_resnet

AMPLITUDE = 0.1
# It leaves the weights where they are, whatever the number of timed steps.
LEARNING_RATE = 1e-6
MOMENTUM = 0.9


@dataclass(frozen=True)
class Method:
    """What is done about BatchNorm.

    Attributes:
        norm: "bn", "gn" (GroupNorm), "none", or "czm" (zero-mean convolutions, no normalisation).
        noise: "naive" for a multiplication after the ReLU, "fused" for `add_relu_noise`, or "".
        compiled: whether the network runs under `torch.compile`.
    """

    norm: str
    noise: str = ""
    compiled: bool = False


METHODS = {
    "batchnorm": Method("bn"),
    "groupnorm": Method("gn"),
    "czm_plain": Method("czm"),
    "czm_naive_noise": Method("czm", "naive"),
    "czm_fused_noise": Method("czm", "fused"),
    "floor": Method("none"),
    "batchnorm_compiled": Method("bn", compiled=True),
    "czm_compiled": Method("czm", "fused", compiled=True),
}


@dataclass(frozen=True)
class Network:
    """A network, and the images that it is measured on if nothing else is asked for.

    Attributes:
        image_size: height and width, in pixels.
        batch: images a step.
        classes: outputs.
        build: makes the network for a method and an image size.
    """

    image_size: int
    batch: int
    classes: int
    build: Callable[[Method, int], nn.Module]


def build(model: str, method: str, image_size: int) -> nn.Module:
    """Build one of `NETWORKS` for one of `METHODS`, always from the same seed, in training mode.

    Raises:
        ImportError: torchvision is not installed, and the model is one of its.
    """
    torch.manual_seed(0)
    return NETWORKS[model].build(METHODS[method], image_size).train()


def make_optimizer(model: nn.Module, method: str) -> torch.optim.Optimizer:
    """Return the fused optimizer of a method: `FusedCZMSGD` for CZM, else torch's SGD."""
    if METHODS[method].norm == "czm":
        return FusedCZMSGD(czm_param_groups(model), lr=LEARNING_RATE, momentum=MOMENTUM)
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


class NaiveNoise(nn.Module):
    """Multiply by u ~ U(1 - a, 1 + a), one number for each sample and channel, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * draw_noise(x, AMPLITUDE).view(*x.shape[:2], 1, 1)


class ReluNoise(nn.Module):
    """Apply the ReLU and the same noise in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return add_relu_noise(x, None, AMPLITUDE, self.training)


class FusedTailBottleneck(nn.Module):
    """Run torchvision's bottleneck, its BatchNorm gone, with sum, ReLU and noise in one operation.

    Args:
        unit: the bottleneck, converted.
        amplitude: of the noise on its output.
    """

    def __init__(self, unit: Any, amplitude: float) -> None:
        super().__init__()
        self.unit = unit
        self.amplitude = amplitude

    def forward(self, x: Tensor) -> Tensor:
        unit = self.unit
        branch = unit.conv3(unit.relu(unit.conv2(unit.relu(unit.conv1(x)))))
        shortcut = x if unit.downsample is None else unit.downsample(x)
        return add_relu_noise(branch, shortcut, self.amplitude, self.training)


def _cifar(depth: int) -> Callable[[Method, int], nn.Module]:
    def build(method: Method, image_size: int) -> nn.Module:
        norm = "bn" if method.norm == "gn" else method.norm
        model = cifar_resnet(depth, norm, noise=AMPLITUDE if method.noise == "fused" else 0.0)
        if method.norm == "gn":
            _use_group_norm(model)
        if method.noise == "naive":
            _add_naive_noise(model.units)
        return model

    return build


def _resnet50(method: Method, image_size: int) -> nn.Module:
    model: Any = _from_torchvision("resnet50", method, image_size)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    if method.noise == "naive":
        for stage in stages:
            _add_naive_noise(stage)
    elif method.noise == "fused":
        # Max-pooling commutes with a positive factor of a channel: the noise may come before it.
        model.relu = ReluNoise()
        last = stages[-1][-1]
        for stage in stages:
            for index, unit in enumerate(stage):
                stage[index] = FusedTailBottleneck(unit, 0.0 if unit is last else AMPLITUDE)
    return model


def _vgg16(method: Method, image_size: int) -> nn.Module:
    # Dropout is no part of the comparison, and would be most of the noise's cost.
    model: Any = _from_torchvision("vgg16_bn", method, image_size, dropout=0.0)
    if method.noise:
        # As in the ResNets, the noise is on the inputs of convolutions: the last ReLU has none.
        relus = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.ReLU)]
        for index in relus[:-1]:
            relu = model.features[index]
            noisy = ReluNoise() if method.noise == "fused" else nn.Sequential(relu, NaiveNoise())
            model.features[index] = noisy
    return model


def _from_torchvision(name: str, method: Method, image_size: int, **options: Any) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"{name} comes from torchvision: pip install czm-fused[train]") from error
    model: nn.Module = getattr(models, name)(**options)
    if method.norm == "gn":
        _use_group_norm(model)
    elif method.norm != "bn":
        convert(model, example_input=torch.zeros(1, 3, image_size, image_size))
    return model


def _use_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            # Wu and He's 32 groups, of at least four channels, or it would be InstanceNorm.
            setattr(module, name, nn.GroupNorm(min(32, channels // 4), channels))
        else:
            _use_group_norm(child)


def _add_naive_noise(units: nn.Sequential) -> None:
    for index, unit in enumerate(units):
        units[index] = nn.Sequential(NaiveNoise(), unit)


NETWORKS = {
    "resnet20": Network(32, 32, 10, _cifar(20)),
    "resnet110": Network(32, 32, 10, _cifar(110)),
    "resnet50": Network(64, 8, 1000, _resnet50),
    "vgg16": Network(64, 8, 1000, _vgg16),
}
