"""The networks of the conversion protocol, with BatchNorm, for images of 16 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

CLASSES = 10


def six_layers() -> nn.Module:
    """Six plain 3x3 convolutions with BatchNorm, three of them strided in place of pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    )


def vgg16_half() -> nn.Module:
    """VGG16's features at half width, average-pooled, with one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 32, 0, 64, 64, 0, 128, 128, 128, 0, 256, 256, 256, 0, 256, 256, 256, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _resnet(name: str) -> nn.Module:
    from torchvision import models

    model: Any = getattr(models, name)(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    built: nn.Module = model
    return built


def _reduced(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Set the strides of the named convolutions to 1."""
    for name in names:
        convolution: Any = model.get_submodule(name)
        convolution.stride = (1, 1)
    return model


def mobilenet_v2() -> nn.Module:
    """torchvision's at half width, without the strides of the stem and of the second stage."""
    from torchvision import models

    model = models.mobilenet_v2(num_classes=CLASSES, width_mult=0.5)
    return _reduced(model, ("features.0.0", "features.2.conv.1.0"))


def efficientnet_b0() -> nn.Module:
    """torchvision's, without the strides of the stem and of the second stage."""
    from torchvision import models

    model = models.efficientnet_b0(num_classes=CLASSES)
    return _reduced(model, ("features.0.0", "features.2.0.block.1.0"))


def shufflenet_v2() -> nn.Module:
    """torchvision's at half width, without the stride of the stem and without max-pooling."""
    from torchvision import models

    model: Any = models.shufflenet_v2_x0_5(num_classes=CLASSES)
    model.maxpool = nn.Identity()
    return _reduced(model, ("conv1.0",))


def densenet() -> nn.Module:
    """torchvision's, of growth 12 and blocks of 6, 6 and 6, with a 3x3 stem and no pool."""
    from torchvision import models

    model: Any = models.DenseNet(12, (6, 6, 6), num_init_features=24, num_classes=CLASSES)
    model.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    built: nn.Module = model
    return built


def regnety_002() -> nn.Module:
    """timm's, without the strides of the stem and of the first stage."""
    import timm

    model = timm.create_model("regnety_002", num_classes=CLASSES)
    return _reduced(model, ("stem.conv", "s1.b1.conv2.conv", "s1.b1.downsample.conv"))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "six_layers": six_layers,
    "vgg16_half": vgg16_half,
    "resnet18": lambda: _resnet("resnet18"),
    "resnet50": lambda: _resnet("resnet50"),
    "mobilenet_v2": mobilenet_v2,
    "densenet": densenet,
    "efficientnet_b0": efficientnet_b0,
    "shufflenet_v2": shufflenet_v2,
    "regnety_002": regnety_002,
}
