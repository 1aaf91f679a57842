"""In-place activated BatchNorm (Rota Bulo et al., arXiv 1712.02616) in place of BatchNorm and ReLU.

Its output is kept instead of its input, which backward computes from it: the activation must be
invertible, a leaky ReLU. A sum and what follows it stay as they are, but for their leaky ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_SLOPE = 0.01


def _activated(norm: Any, activation: str = "leaky_relu") -> nn.Module:
    from inplace_abn import InPlaceABN

    layer: nn.Module = InPlaceABN(norm.num_features, activation=activation, activation_param=_SLOPE)
    return layer


class LeakyCIFARUnit(nn.Module):
    """Run a CIFAR unit whose first convolution is followed by BatchNorm and activation in one."""

    def __init__(self, unit: Any) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        branch = self.unit.conv2(self.unit.conv1(x))
        return F.leaky_relu(branch + self.unit.shortcut(x), _SLOPE, inplace=True)


class LeakyBottleneck(nn.Module):
    """Run torchvision's bottleneck with BatchNorm and activation in one."""

    def __init__(self, unit: Any) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        unit = self.unit
        branch = unit.bn2(unit.conv2(unit.bn1(unit.conv1(x))))
        branch = unit.bn3(unit.conv3(branch))
        shortcut = x if unit.downsample is None else unit.downsample(x)
        return F.leaky_relu(branch + shortcut, _SLOPE, inplace=True)


class LeakyCIFARResNet(nn.Module):
    """Run a CIFAR ResNet whose stem is followed by BatchNorm and activation in one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stem = model.stem
        self.units = nn.Sequential(*(LeakyCIFARUnit(unit) for unit in model.units))
        self.classifier = model.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(self.stem(x))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def cifar(model: Any) -> nn.Module:
    """Return the CIFAR ResNet `model`, which has BatchNorm, with the activated one instead."""
    model.stem[1] = _activated(model.stem[1])
    for unit in model.units:
        unit.conv1[1] = _activated(unit.conv1[1])
        unit.conv2[1] = _activated(unit.conv2[1], "identity")
    return LeakyCIFARResNet(model)


def bottlenecks(model: Any, stages: Sequence[nn.Sequential]) -> nn.Module:
    """Return torchvision's ResNet `model` with the activated BatchNorm; `stages` are its units."""
    model.bn1, model.relu = _activated(model.bn1), nn.Identity()
    for stage in stages:
        for index, unit in enumerate(stage):
            found: Any = unit
            found.bn1, found.bn2 = _activated(found.bn1), _activated(found.bn2)
            found.bn3 = _activated(found.bn3, "identity")
            if found.downsample is not None:
                found.downsample[1] = _activated(found.downsample[1], "identity")
            stage[index] = LeakyBottleneck(found)
    built: nn.Module = model
    return built


def sequential(features: nn.Sequential) -> None:
    """Replace every BatchNorm and the ReLU that follows it in `features`."""
    for index, layer in enumerate(features):
        if isinstance(layer, nn.BatchNorm2d):
            features[index], features[index + 1] = _activated(layer), nn.Identity()
