"""Two small networks for small images, with each way to train with or without normalisation.

Layers come from torch, timm and czm_fused; dynamic tanh, which none of them has, is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from czm_fused import FusedCZMSGD, czm_init_, czm_param_groups
from czm_fused.functional import add_relu_noise

CLASSES = 10
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# Variance-preserving gain of a ReLU for standardised weights (Brock et al., arXiv 2101.08692).
_RELU_GAIN = 1.7139588594436646
_SGD_RATES = (0.03, 0.1, 0.3)
_CZM_RATES = (0.1, 0.2, 0.4)


class DynamicTanh(nn.Module):
    """Scale, squash and shift: weight * tanh(alpha * x) + bias (Zhu et al., arXiv 2503.10622).

    Args:
        channels: of the input, `(N, channels, H, W)`.
        alpha: initial value of the learnt scale, the paper's 0.5 by default.
    """

    def __init__(self, channels: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


def _conv(before: int, width: int, size: int, *, norm: bool, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, width, size, padding=size // 2, bias=not norm, **options)


def _standardised(before: int, width: int, size: int, **options: Any) -> nn.Module:
    from timm.layers.std_conv import StdConv2d

    conv: nn.Module = StdConv2d(before, width, size, padding=size // 2, bias=False, **options)
    return conv


def _scaled(before: int, width: int, size: int, **options: Any) -> nn.Module:
    from timm.layers.std_conv import ScaledStdConv2d

    padding = size // 2
    conv: nn.Module = ScaledStdConv2d(
        before, width, size, padding=padding, gamma=_RELU_GAIN, **options
    )
    return conv


def _group_norm(channels: int) -> nn.Module:
    # Wu and He's 32 groups, of at least four channels, or it would be InstanceNorm.
    return nn.GroupNorm(min(32, channels // 4), channels)


def _with_relu(norm: Callable[[int], nn.Module], channels: int) -> nn.Module:
    return nn.Sequential(norm(channels), nn.ReLU(inplace=True))


def _evo_norm(channels: int) -> nn.Module:
    from timm.layers.evo_norm import EvoNorm2dS0

    norm: nn.Module = EvoNorm2dS0(channels, groups=min(32, channels // 4))
    return norm


def _frn(channels: int, apply_act: bool = True) -> nn.Module:
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d

    norm: nn.Module = FilterResponseNormTlu2d(channels, apply_act=apply_act)
    return norm


def _nothing(channels: int) -> nn.Module:
    return nn.Identity()


def _relu(channels: int) -> nn.Module:
    return nn.ReLU(inplace=True)


@dataclass(frozen=True)
class Provider:
    """One way to train a network.

    Attributes:
        conv: makes a convolution of `(before, width, size, **options)`.
        norm: makes what follows a convolution without activation, for some channels.
        norm_act: makes what follows a convolution with activation.
        branch: factor of a residual branch.
        czm: train with FusedCZMSGD and this share of zero-mean gradient; None for torch's SGD.
        noise: amplitude on the inputs of residual units.
        clip: factor of adaptive gradient clipping; 0 for none.
        center_every: steps from one call of `center_` to the next; 0 for none. Such a network
            starts with scales measured on a batch, and its gradients are bounded.
        grad_norm: of `FusedCZMSGD`, with weight decay in place of LUMA; 0: with `center_`,
            gradients are clipped instead.
        compiled: run under `torch.compile`.
        rates: learning rates to choose from.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]
    norm_act: Callable[[int], nn.Module]
    branch: float = 1.0
    czm: float | None = None
    noise: float = 0.0
    clip: float = 0.0
    center_every: int = 0
    grad_norm: float = 0.0
    compiled: bool = False
    rates: tuple[float, ...] = _SGD_RATES


def _normalised(
    norm: Callable[[int], nn.Module], conv: Callable[..., nn.Module] | None = None, **options: Any
) -> Provider:
    conv = conv or partial(_conv, norm=True)
    return Provider(conv, norm, partial(_with_relu, norm), **options)


_BIASED = partial(_conv, norm=False)
_CZM = partial(Provider, _BIASED, _nothing, _relu, rates=_CZM_RATES)
PROVIDERS = {
    "batchnorm": _normalised(nn.BatchNorm2d),
    "batchnorm_compiled": _normalised(nn.BatchNorm2d, compiled=True),
    "groupnorm": _normalised(_group_norm),
    "groupnorm_ws": _normalised(_group_norm, _standardised),
    "frn_tlu": Provider(partial(_conv, norm=True), partial(_frn, apply_act=False), _frn),
    "evonorm_s0": Provider(partial(_conv, norm=True), _nothing, _evo_norm),
    "nf_agc": Provider(_scaled, _nothing, _relu, branch=0.2, clip=0.02),
    "dynamic_tanh": _normalised(DynamicTanh),
    "plain": Provider(_BIASED, _nothing, _relu, rates=(0.01, 0.03, 0.1)),
    "czmi": _CZM(czm=0.0),
    "czmig": _CZM(czm=0.85),
    "czmig_noise": _CZM(czm=0.85, noise=0.1),
    # docs/recipes.md: what converted networks begin with, and what depthwise ones do.
    "czmig_centered": _CZM(czm=0.85, center_every=20, rates=(0.03, 0.1, 0.2)),
    "czmig_normalised": _CZM(czm=0.85, center_every=20, grad_norm=0.1, rates=(0.01, 0.02, 0.05)),
}


class BasicUnit(nn.Module):
    """He et al.'s residual unit with an option-A shortcut."""

    def __init__(self, provider: Provider, before: int, width: int) -> None:
        super().__init__()
        self.stride, self.missing = 1 if before == width else 2, width - before
        self.branch, self.noise, self.is_czm = provider.branch, provider.noise, provider.czm
        self.conv1 = provider.conv(before, width, 3, stride=self.stride)
        self.act1 = provider.norm_act(width)
        self.conv2 = provider.conv(width, width, 3)
        # EvoNorm normalises with its activation, after the sum.
        normalises = provider.norm is not _nothing
        self.norm2 = provider.norm(width)
        self.act2 = nn.ReLU(inplace=True) if normalises else provider.norm_act(width)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.missing:
            padding = (0, 0, 0, 0, 0, self.missing)
            shortcut = nn.functional.pad(x[:, :, ::2, ::2], padding)
        out = self.norm2(self.conv2(self.act1(self.conv1(x))))
        if self.is_czm is not None:
            return add_relu_noise(out, shortcut, self.noise, self.training)
        out = out if self.branch == 1 else self.branch * out
        result: Tensor = self.act2(out + shortcut)
        return result


class InvertedUnit(nn.Module):
    """MobileNetV2's inverted residual: expand three times, filter each channel, project."""

    def __init__(self, provider: Provider, before: int, width: int, stride: int) -> None:
        super().__init__()
        inner = 3 * before
        self.has_shortcut = before == width and stride == 1
        self.branch = provider.branch if self.has_shortcut else 1.0
        self.layers = nn.Sequential(
            provider.conv(before, inner, 1),
            provider.norm_act(inner),
            provider.conv(inner, inner, 3, stride=stride, groups=inner),
            provider.norm_act(inner),
            provider.conv(inner, width, 1),
            provider.norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        if not self.has_shortcut:
            return out
        return x + (out if self.branch == 1 else self.branch * out)


def resnet20(provider: Provider, width: int = 16) -> nn.Module:
    """Return He et al.'s ResNet20 for CIFAR; `width` is that of its first stage."""
    widths = [width] + [width * factor for factor in (1, 2, 4) for _ in range(3)]
    units = [BasicUnit(provider, *pair) for pair in zip(widths, widths[1:], strict=False)]
    return _network(provider, width, units, widths[-1])


def depthwise(provider: Provider, width: int = 16) -> nn.Module:
    """Return a small MobileNetV2: eight inverted residuals; `width` is that of its stem."""
    widths = [width] + [width * factor for factor in (1, 2, 4, 8) for _ in range(2)]
    strides = [1, 1, 2, 1, 2, 1, 1, 1]
    pairs = zip(widths, widths[1:], strides, strict=False)
    units = [InvertedUnit(provider, *each) for each in pairs]
    return _network(provider, width, units, widths[-1])


def _network(provider: Provider, width: int, units: list[Any], last: int) -> nn.Module:
    stem = nn.Sequential(provider.conv(3, width, 3), provider.norm_act(width))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES))
    return nn.Sequential(stem, *units, head)


NETWORKS = {"resnet20": resnet20, "depthwise": depthwise}


def build(network: str, provider: str, batch: Tensor, seed: int, width: int = 16) -> nn.Module:
    """Build a network for a provider, in training mode and not compiled.

    ResNet20 starts with CZM as its paper says; the scales of the depthwise network, which the
    paper's do not fit, and of networks that are centred are measured on `batch`. All others start
    as torch initialises, by He et al. for ReLUs.

    Args:
        network: one of `NETWORKS`.
        provider: one of `PROVIDERS`.
        batch: images, `(N, 3, H, W)`, on the device of the network.
        seed: of the weights.
        width: channels of the stem.
    """
    torch.manual_seed(seed)
    chosen = PROVIDERS[provider]
    model: nn.Module = NETWORKS[network](chosen, width)
    if chosen.czm is None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model = model.to(batch.device).train()
    if chosen.czm is not None:
        is_measured = network != "resnet20" or chosen.center_every
        czm_init_(model, stem="0.0", example_input=batch if is_measured else None)
    return model


def make_optimizer(model: nn.Module, provider: str, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of a provider.

    With CZM, all but the filters learn at a quarter of `lr`; in centred networks all at `lr`, but
    the biases of convolutions whose gradients are normalised at a tenth.

    Args:
        model: as `build` returns it.
        provider: one of `PROVIDERS`.
        lr: learning rate.
    """
    chosen = PROVIDERS[provider]
    if chosen.czm is None:
        return torch.optim.SGD(
            model.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
        )
    overrides = {} if chosen.center_every else {"rest": {"lr": lr / 4}}
    settings = {}
    if chosen.grad_norm:
        overrides = {"bias": {"lr": lr / 10}}
        settings = {"grad_norm": chosen.grad_norm, "weight_decay": 5e-3, "luma": 0.0}
    groups = czm_param_groups(model, stem="0.0", overrides=overrides)
    return FusedCZMSGD(groups, lr, MOMENTUM, zmg=chosen.czm, **settings)


def clip_gradients(model: nn.Module, provider: str) -> None:
    """Clip the gradients, if the provider does."""
    chosen = PROVIDERS[provider]
    if chosen.clip:
        from timm.utils.agc import adaptive_clip_grad

        # The classifier is not clipped (Brock et al., arXiv 2102.06171, section 4.1).
        assert isinstance(model, nn.Sequential)
        adaptive_clip_grad(model[:-1].parameters(), clip_factor=chosen.clip)
    elif chosen.center_every and not chosen.grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
