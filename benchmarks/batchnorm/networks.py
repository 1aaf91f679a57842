"""The networks, with BatchNorm and with what may take its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, convert, czm_param_groups
from czm_fused.functional import add_relu_noise, draw_noise
from czm_fused.models import cifar_resnet
from czm_fused.models.cifar_resnet import CIFARResNet
from czm_fused.nn import CZMBasicBlock

from . import inplace

AMPLITUDE = 0.1
# It leaves the weights where they are, whatever the number of timed steps.
LEARNING_RATE = 1e-6
MOMENTUM = 0.9


@dataclass(frozen=True)
class Method:
    """What is done about BatchNorm.

    Attributes:
        norm: "bn", "gn" (GroupNorm), "abn" (in-place activated BatchNorm), "none", or "czm"
            (zero-mean convolutions, no normalisation).
        noise: whether the inputs of residual units (vgg16: of convolutions) are multiplied by it.
        fused: whether sum, ReLU and noise are one operation, `add_relu_noise`, or each its own, as
            networks are commonly written.
        compiled: whether the network runs under `torch.compile`.
        same_as: the method whose loss and gradients it must give, or "".
    """

    norm: str
    noise: bool = False
    fused: bool = False
    compiled: bool = False
    same_as: str = ""


METHODS = {
    "batchnorm": Method("bn"),
    "batchnorm_fused_tail": Method("bn", fused=True, same_as="batchnorm"),
    "groupnorm": Method("gn"),
    "inplace_abn": Method("abn"),
    "czm_plain": Method("czm", fused=True),
    "czm_naive_noise": Method("czm", noise=True),
    "czm_fused_noise": Method("czm", noise=True, fused=True, same_as="czm_naive_noise"),
    "floor": Method("none", fused=True),
    "batchnorm_compiled": Method("bn", compiled=True, same_as="batchnorm"),
    "czm_compiled": Method("czm", noise=True, fused=True, compiled=True, same_as="czm_fused_noise"),
}


@dataclass(frozen=True)
class Network:
    """A network, and the images that it is measured on if nothing else is asked for.

    Attributes:
        image_size: height and width, in pixels.
        batch: images a step.
        classes: outputs.
        build: makes the network for a method and an image size.
        has_units: whether it has residual units, with a tail to fuse.
    """

    image_size: int
    batch: int
    classes: int
    build: Callable[[Method, int], nn.Module]
    has_units: bool = True


def unavailable(model: str, method: str) -> str | None:
    """Return why a method cannot be measured on a model here, or None where it can."""
    wanted = METHODS[method]
    if wanted.norm == "abn" and find_spec("inplace_abn") is None:
        return "it needs the package inplace_abn: pip install inplace-abn"
    if wanted.norm == "bn" and wanted.fused and not NETWORKS[model].has_units:
        return f"{model} has no residual units"
    return None


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
        return x * draw_noise(x, AMPLITUDE).to(x.dtype).view(*x.shape[:2], 1, 1)


class ReluNoise(nn.Module):
    """Apply the ReLU and the same noise in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return add_relu_noise(x, None, AMPLITUDE, self.training)


class FusedTailBottleneck(nn.Module):
    """Run torchvision's bottleneck with sum, ReLU and noise in one operation.

    Args:
        unit: the bottleneck, with BatchNorm or converted.
        amplitude: of the noise on its output.
    """

    def __init__(self, unit: Any, amplitude: float) -> None:
        super().__init__()
        self.unit = unit
        self.amplitude = amplitude

    def forward(self, x: Tensor) -> Tensor:
        unit = self.unit
        branch = unit.relu(unit.bn2(unit.conv2(unit.relu(unit.bn1(unit.conv1(x))))))
        branch = unit.bn3(unit.conv3(branch))
        shortcut = x if unit.downsample is None else unit.downsample(x)
        return add_relu_noise(branch, shortcut, self.amplitude, self.training)


class OrdinaryUnit(nn.Module):
    """Run a unit of a CIFAR ResNet as such units are commonly written, in place where that goes."""

    def __init__(self, unit: CZMBasicBlock) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        unit = self.unit
        branch = unit.conv2(F.relu(unit.conv1(x), inplace=True))
        branch += unit.shortcut(x)
        return F.relu(branch, inplace=True)


class OrdinaryCIFARResNet(nn.Module):
    """Run a CIFAR ResNet in torch's own operations alone."""

    def __init__(self, model: CIFARResNet) -> None:
        super().__init__()
        self.stem = model.stem
        self.units = nn.Sequential(*(OrdinaryUnit(unit) for unit in model.units))
        self.classifier = model.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(F.relu(self.stem(x), inplace=True))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def _cifar(depth: int) -> Callable[[Method, int], nn.Module]:
    def build(method: Method, image_size: int) -> nn.Module:
        norm = "bn" if method.norm in ("gn", "abn") else method.norm
        amplitude = AMPLITUDE if method.noise and method.fused else 0.0
        model: Any = cifar_resnet(depth, norm, noise=amplitude)
        if method.norm == "abn":
            return inplace.cifar(model)
        if method.norm == "gn":
            _use_group_norm(model)
        if not method.fused:
            model = OrdinaryCIFARResNet(model)
            if method.noise:
                _add_naive_noise(model.units)
        return model

    return build


def _resnet50(method: Method, image_size: int) -> nn.Module:
    model: Any = _from_torchvision("resnet50", method, image_size)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    if method.norm == "abn":
        return inplace.bottlenecks(model, stages)
    amplitude = AMPLITUDE if method.noise else 0.0
    if method.fused:
        if method.noise:
            # Max-pooling commutes with a positive factor of a channel: noise may come before it.
            model.relu = ReluNoise()
        last = stages[-1][-1]
        for stage in stages:
            for index, unit in enumerate(stage):
                stage[index] = FusedTailBottleneck(unit, 0.0 if unit is last else amplitude)
    elif method.noise:
        for stage in stages:
            _add_naive_noise(stage)
    return model


def _vgg16(method: Method, image_size: int) -> nn.Module:
    # Dropout is no part of the comparison, and would be most of the noise's cost.
    model: Any = _from_torchvision("vgg16_bn", method, image_size, dropout=0.0)
    if method.norm == "abn":
        inplace.sequential(model.features)
    if method.noise:
        # As in the ResNets, the noise is on the inputs of convolutions: the last ReLU has none.
        relus = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.ReLU)]
        for index in relus[:-1]:
            relu = model.features[index]
            noisy = ReluNoise() if method.fused else nn.Sequential(relu, NaiveNoise())
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
    elif method.norm in ("czm", "none"):
        convert(model, example_input=torch.zeros(1, 3, image_size, image_size), gain=0.8)
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
    "resnet20": Network(32, 128, 10, _cifar(20)),
    "resnet110": Network(32, 32, 10, _cifar(110)),
    "resnet50": Network(64, 8, 1000, _resnet50),
    "vgg16": Network(64, 8, 1000, _vgg16, has_units=False),
}
