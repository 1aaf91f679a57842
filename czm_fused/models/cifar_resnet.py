"""He et al.'s residual networks for CIFAR, with zero-mean convolutions, BatchNorm or neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._internal.replacement import replace_modules
from ..nn import CZMBasicBlock, CZMConv2d, residual_tail

NORMS = ("czm", "bn", "none")
NOISE_ON = ("unit", "branch")
WIDTHS = (16, 32, 64)

torch.fx.wrap("residual_tail")


def blocks_per_stage(depth: int) -> int:
    """Return n, the residual units in each stage of a CIFAR ResNet of `depth` = 6n + 2 layers.

    Raises:
        ValueError: `depth` is not 6n + 2 with n >= 1; the message names the nearest that is.
    """
    blocks = max(1, round((depth - 2) / 6))
    if depth != 6 * blocks + 2:
        raise ValueError(
            f"depth must be 6n + 2 (8, 14, 20, ...), but was {depth}; "
            f"the nearest is {6 * blocks + 2}"
        )
    return blocks


def cifar_resnet(
    depth: int,
    norm: str = "czm",
    noise: float = 0.0,
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    noise_on: str = "unit",
    residual_bias: bool = False,
) -> CIFARResNet:
    """Build a CIFAR ResNet: a stem, three stages of n units of 16, 32, 64 channels, a classifier.

    The network of He et al., arXiv 1512.03385, §4.2, with option-A shortcuts; the paper's §4 trains
    it without normalisation. Takes images of any size; the stages see 1, 1/2 and 1/4 of it.

    Args:
        depth: 6n + 2.
        norm: `"czm"` for zero-mean convolutions; `"bn"` for BatchNorm after every convolution;
            `"none"` for neither, with PyTorch's own initialisation.
        noise: amplitude a of the factor u ~ U(1 - a, 1 + a) on the input of every residual unit,
            drawn once for each sample and channel, in training only (§4.4); in [0, 1). Default 0.
        in_channels: channels of the images. Default 3.
        num_classes: outputs. Default 10.
        noise_on: `"unit"`, so that convolutions and shortcut see the noise (the default), or
            `"branch"`, the convolutions alone.
        residual_bias: whether the convolutions of the residual units have biases. The stem has
            one in any case, and with `"bn"` no convolution has. Default False.

    Raises:
        ValueError: the depth is not 6n + 2, or another argument is out of range.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, but was {norm!r}")
    if noise_on not in NOISE_ON:
        raise ValueError(f"noise_on must be one of {', '.join(NOISE_ON)}, but was {noise_on!r}")
    if not 0 <= noise < 1:
        raise ValueError(f"noise must be in [0, 1), but was {noise}")
    if norm == "bn" and residual_bias:
        raise ValueError("residual_bias must be False with norm='bn', which has biases of its own")
    model = CIFARResNet(
        depth,
        noise=noise,
        noise_on=noise_on,
        in_channels=in_channels,
        num_classes=num_classes,
        residual_bias=residual_bias,
    )
    if norm != "czm":
        baseline = _with_batch_norm if norm == "bn" else _plain
        convolutions = [each for each in model.modules() if isinstance(each, CZMConv2d)]
        replace_modules(model, {each: baseline(each) for each in convolutions})
        model.classifier.reset_parameters()
    return model


class CIFARResNet(nn.Module):
    """The zero-mean network that `cifar_resnet` builds, and makes the others from."""

    def __init__(
        self,
        depth: int,
        *,
        noise: float,
        noise_on: str,
        in_channels: int,
        num_classes: int,
        residual_bias: bool,
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        widths = [width for width in WIDTHS for _ in range(blocks)]
        # The noise on a unit's output is that on the next one's input, and the last has no next.
        self.noise = noise if noise_on == "unit" else 0.0
        amplitudes = [self.noise] * (len(widths) - 1) + [0.0]
        self.stem = CZMConv2d(in_channels, WIDTHS[0], 3, padding=1, stem=True)
        self.units = nn.Sequential(
            *(
                CZMBasicBlock(
                    before,
                    width,
                    stride=1 if before == width else 2,
                    amplitude=amplitude,
                    branch_amplitude=noise if noise_on == "branch" else 0.0,
                    bias=residual_bias,
                )
                for before, width, amplitude in zip(
                    [WIDTHS[0], *widths[:-1]], widths, amplitudes, strict=True
                )
            )
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, `(images, num_classes)`, of images `(images, channels, H, W)`."""
        x = residual_tail(self.stem(x), None, self.noise, self.training)
        x = self.units(x)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class ConvBatchNorm(nn.Sequential):
    """A convolution followed by BatchNorm, in the place of a convolution."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(convolution, nn.BatchNorm2d(convolution.out_channels))
        self.out_channels = convolution.out_channels


def _with_batch_norm(convolution: CZMConv2d) -> nn.Module:
    baseline = _plain(convolution, bias=False)
    nn.init.kaiming_normal_(baseline.weight, mode="fan_out", nonlinearity="relu")
    return ConvBatchNorm(baseline)


def _plain(convolution: CZMConv2d, bias: bool | None = None) -> nn.Conv2d:
    return nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        3,
        convolution.stride[0],
        padding=1,
        bias=convolution.bias is not None if bias is None else bias,
    )
