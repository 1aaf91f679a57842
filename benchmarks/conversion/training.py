"""One training of the conversion protocol: a network, a method, settings, a seed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, center_, convert, czm_param_groups
from czm_fused.calibration import TARGET

from .data import Images
from .networks import NETWORKS

DEPTHWISE = ("mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
"""Networks with depthwise convolutions, which bfloat16 slows on a CPU; autocast for the others."""


@dataclass(frozen=True)
class Settings:
    """All that a training depends on.

    Attributes:
        network: one of `NETWORKS`.
        method: "bn", momentum SGD with weight decay 5e-4, or "czm".
        steps, batch: how many steps, of how many images.
        lr: the rate, half a cosine.
        lr_rest: the rate of biases and linear layers (czm); None: `lr`.
        bias_rate: the rate of convolutions' biases as a share of `lr` (czm); None: as `lr_rest`.
        warmup: steps of linear warm-up (czm).
        zmg, luma, weight_decay: of `FusedCZMSGD`.
        center_every: steps from one call of `center_` to the next (czm); 0: none.
        norm: `grad_norm` of `FusedCZMSGD`.
        clip: bound of the norm of all gradients (czm), without `norm`; 0: none.
        gain, zero_mean, noise: of `convert`.
        target: of `convert`, without `gain`.
        seed: of the weights and of the order of images.
    """

    network: str
    method: str = "czm"
    steps: int = 1500
    batch: int = 64
    lr: float = 0.1
    lr_rest: float | None = None
    bias_rate: float | None = None
    warmup: int = 0
    zmg: float = 0.98
    luma: float = 5e-4
    weight_decay: float = 0.0
    center_every: int = 0
    norm: float = 0.0
    clip: float = 1.0
    gain: float | None = None
    zero_mean: bool | None = None
    target: float = TARGET
    noise: float = 0.0
    seed: int = 0


def build(s: Settings, example: Tensor) -> nn.Module:
    """Build the network of `s`, converted unless its method is "bn"; `example` is a batch."""
    torch.manual_seed(s.seed)
    model: Any = NETWORKS[s.network]()
    if s.method == "czm":
        convert(
            model,
            example_input=example,
            gain=s.gain,
            zero_mean=s.zero_mean,
            target=s.target if s.gain is None else None,
            noise=s.noise,
        )
    channels_last: nn.Module = model.to(memory_format=torch.channels_last)
    return channels_last


def optimizer_of(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of the method."""
    if s.method == "bn":
        return torch.optim.SGD(
            model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4, fused=True
        )
    overrides = {} if s.lr_rest is None else {"rest": {"lr": s.lr_rest}}
    if s.bias_rate is not None:
        overrides["bias"] = {"lr": s.bias_rate * s.lr}
    groups = czm_param_groups(model, overrides=overrides)
    return FusedCZMSGD(
        groups,
        lr=s.lr,
        momentum=0.9,
        zmg=s.zmg,
        luma=s.luma,
        grad_norm=s.norm,
        weight_decay=s.weight_decay,
    )


def clip_gradients(model: nn.Module, s: Settings) -> None:
    """Clip the gradients as the settings ask; a BatchNorm network's stay."""
    if s.method == "czm" and s.clip and not s.norm:
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)


def spread(logits: Tensor) -> float:
    """Return the standard deviation over the images, the root mean square over the classes."""
    return logits.float().var(dim=0, correction=0).mean().sqrt().item()


def train(s: Settings, data: Path) -> dict[str, Any]:
    """Train, and return the row: settings, logits' spread at the start, loss, accuracies, time."""
    images = Images(data)
    started = time.perf_counter()
    example = images.inputs(images.train[0][:64])
    model = build(s, example)
    with torch.no_grad():
        # BatchNorm starts with the statistics of the batch; its running ones do not count.
        logits = spread(model.train(s.method == "bn")(example))
    optimizer = optimizer_of(model, s)
    warmup = max(s.warmup if s.method == "czm" else 0, 1)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / s.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    torch.manual_seed(s.seed)
    losses: list[float] = []
    use_autocast = s.network not in DEPTHWISE
    for step, (x, y) in enumerate(images.batches(s.steps, s.batch, s.seed)):
        if s.center_every and step % s.center_every == 0:
            center_(model, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
            output = model(x)
        loss = F.cross_entropy(output.float(), y)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model, s)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    tail = losses[-max(1, s.steps // 10) :]
    return {
        **asdict(s),
        "logits": logits,
        "loss": sum(tail) / len(tail),
        "held_out": accuracy(model, images, images.held_out, use_autocast),
        "test": accuracy(model, images, images.test, use_autocast),
        "steps_taken": len(losses),
        "seconds": round(time.perf_counter() - started, 1),
    }


def accuracy(
    model: nn.Module, images: Images, part: tuple[Tensor, Tensor], use_autocast: bool
) -> float:
    """Return the percentage of the images of `part` that `model` classifies correctly."""
    model.eval()
    correct = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        for x, y in zip(*(each.split(500) for each in part), strict=True):
            correct += int((model(images.inputs(x)).argmax(1) == y).sum())
    return round(100 * correct / len(part[1]), 2)
