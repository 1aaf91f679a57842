"""One training of the conversion protocol: a network, a method, settings, a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, convert, czm_param_groups
from czm_fused.calibration import calibrate_

from .data import Images
from .networks import NETWORKS

FLOAT32 = ("mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
"""Networks with depthwise convolutions, which bfloat16 slows on a CPU; autocast for the others."""


@dataclass(frozen=True)
class Settings:
    """All that a training depends on.

    Attributes:
        network: one of `NETWORKS`.
        method: "bn", momentum SGD with weight decay 5e-4, or "czm".
        steps, batch: how many steps, of how many images.
        lr: rate of the filters (bn: of everything), half a cosine.
        lr_bias, lr_head: rates of biases and of linear layers; None: `lr`.
        g_rate: rate of the log-scales g as a share of `lr`.
        warmup: steps of linear warm-up.
        zmg, luma: of `FusedCZMSGD`.
        clip: bound of the norm of all gradients; 0: none.
        agc: bound of the norm of dV of one filter, whose norm ‖V‖ is about 1; 0: none.
        start: "calibrated" by `calibrate_`, or "gain": every filter has the norm `gain`.
        target, branch, center: of `calibrate_`.
        depthwise_zero_mean: whether depthwise filters start and stay at zero mean, as others do.
        noise: of `convert`.
        seed: of the weights and of the order of images.
        split: "held_out" or "test", the images of the accuracy.
    """

    network: str
    method: str = "czm"
    steps: int = 1500
    batch: int = 64
    lr: float = 0.1
    lr_bias: float | None = None
    lr_head: float | None = None
    g_rate: float = 1.0
    warmup: int = 100
    zmg: float = 0.85
    luma: float = 5e-4
    clip: float = 0.0
    agc: float = 0.05
    start: str = "calibrated"
    gain: float = 0.8
    target: float = 1.0
    branch: float = 0.5
    center: bool = True
    depthwise_zero_mean: bool = False
    noise: float = 0.0
    seed: int = 0
    split: str = "held_out"


class ClippedCZMSGD(FusedCZMSGD):
    """FusedCZMSGD with a bound on each filter's gradient and a rate of their own for log-scales.

    Args:
        params: as in `FusedCZMSGD`.
        agc: bound of ‖dV[f]‖ = exp(g[f]) ‖dW[f]‖; 0: none.
        g_rate: rate of g as a share of the learning rate.
        defaults: as in `FusedCZMSGD`.
    """

    def __init__(self, params: Any, *, agc: float, g_rate: float, **defaults: Any) -> None:
        super().__init__(params, **defaults)
        self.agc = agc
        self.g_rate = g_rate

    def _filters(self) -> Iterator[tuple[Tensor, Tensor]]:
        for weight in (p for group in self.param_groups for p in group["params"]):
            if weight.grad is not None and "log_scale" in self.state.get(weight, {}):
                yield weight, self.state[weight]["log_scale"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; the first one, which makes the log-scales, is not clipped."""
        before = {}
        for weight, g in self._filters():
            before[weight] = g.clone()
            if self.agc:
                norms = weight.grad.flatten(1).norm(dim=1) * g.exp()  # type: ignore[union-attr]
                factors = (self.agc / norms.clamp(min=1e-12)).clamp(max=1)
                weight.grad.mul_(_by_filter(factors, weight))  # type: ignore[union-attr]
        result = super().step(closure)
        if self.g_rate != 1:
            for weight, g in self._filters():
                if weight in before:
                    wanted = before[weight] + self.g_rate * (g - before[weight])
                    weight.mul_(_by_filter((wanted - g).exp(), weight))
                    g.copy_(wanted)
        return result


def _by_filter(factors: Tensor, weight: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (weight.dim() - 1))


def _is_depthwise(convolution: nn.Conv2d) -> bool:
    return convolution.groups == convolution.in_channels > 1


def _channels_last(model: Any) -> nn.Module:
    converted: nn.Module = model.to(memory_format=torch.channels_last)
    return converted


def build(s: Settings, example: Tensor) -> nn.Module:
    """Build the network of `s`, converted unless its method is "bn"; `example` is a batch."""
    torch.manual_seed(s.seed)
    model = NETWORKS[s.network]()
    if s.method == "bn":
        return _channels_last(model)
    options: dict[str, Any] = {"noise": s.noise} if s.noise else {}
    converted: Any = convert(model, example_input=example[:16], gain=s.gain, **options)
    model = converted[0] if isinstance(converted, tuple) else converted
    if not s.depthwise_zero_mean:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d) and _is_depthwise(module):
                    module.weight.uniform_(-1, 1)
                    norms = module.weight.flatten(1).norm(dim=1)
                    module.weight.mul_(_by_filter(s.gain / norms, module.weight))
    if s.start == "calibrated":
        calibrate_(model, example, target=s.target, branch=s.branch, center=s.center)
    return _channels_last(model)


def groups_of(model: nn.Module, s: Settings) -> list[dict[str, Any]]:
    """Return `czm_param_groups(model)` with depthwise filters, biases and linear layers apart."""
    groups = []
    for group in czm_param_groups(model):
        parts: dict[str, list[tuple[str, Tensor]]] = {}
        for name, p in zip(group["param_names"], group["params"], strict=True):
            part = group["name"]
            if part == "spatial" and p.shape[1] == 1 and not s.depthwise_zero_mean:
                part = "depthwise"
            elif part == "rest":
                part = "bias" if p.dim() < 2 else "head"
            parts.setdefault(part, []).append((name, p))
        for part, named in parts.items():
            settings = dict(group, name=part, params=[p for _, p in named])
            settings["param_names"] = [name for name, _ in named]
            if part == "depthwise":
                settings["zmg"] = 0.0
            rate = {"bias": s.lr_bias, "head": s.lr_head}.get(part)
            groups.append(settings if rate is None else dict(settings, lr=rate))
    return groups


def optimizer_of(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of the method."""
    if s.method == "bn":
        return torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4)
    return ClippedCZMSGD(
        groups_of(model, s),
        agc=s.agc,
        g_rate=s.g_rate,
        lr=s.lr,
        momentum=0.9,
        zmg=s.zmg,
        luma=s.luma,
    )


def spread(logits: Tensor) -> float:
    """Return the standard deviation over the images, the root mean square over the classes."""
    return logits.float().var(dim=0, correction=0).mean().sqrt().item()


def train(s: Settings, data: Path) -> dict[str, Any]:
    """Train, and return the row: settings, logits' spread at the start, loss, accuracy, seconds."""
    images = Images(data, s.split)
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
    use_autocast = s.network not in FLOAT32
    for x, y in images.batches(s.steps, s.batch, s.seed):
        with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
            output = model(x)
        loss = F.cross_entropy(output.float(), y)
        optimizer.zero_grad()
        loss.backward()
        if s.clip:
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
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
        "accuracy": round(100 * accuracy(model, images, use_autocast), 2),
        "steps_taken": len(losses),
        "seconds": round(time.perf_counter() - started, 1),
    }


def accuracy(model: nn.Module, images: Images, use_autocast: bool) -> float:
    """Return the share of the test images of `images` that `model` classifies correctly."""
    model.eval()
    correct = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        for x, y in zip(*(part.split(500) for part in images.test), strict=True):
            correct += int((model(images.inputs(x)).argmax(1) == y).sum())
    return correct / len(images.test[1])
