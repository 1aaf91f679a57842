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
from czm_fused.calibration import _spread, calibrate_

from .networks import NETWORKS

HELD_OUT = 5_000
DEPTHWISE = ("mobilenet_v2", "efficientnet_b0", "shufflenet_v2")


@dataclass(frozen=True)
class Settings:
    """Everything that a training depends on.

    Attributes:
        network: one of `NETWORKS`.
        method: "bn" or "czm".
        lr: of the filters (bn: of everything).
        lr_bias, lr_head: of biases and of linear layers; None: `lr`.
        g_rate: the rate of g as a share of `lr`.
        g_bound: how far g may go from its start; 0: as far as it likes.
        clip: bound of the norm of all gradients; 0: none.
        agc: bound of the norm of a filter's gradient dV; 0: none.
        warmup: steps of linear warm-up.
    """

    network: str
    method: str = "czm"
    steps: int = 470
    batch: int = 64
    lr: float = 0.1
    lr_bias: float | None = None
    lr_head: float | None = None
    g_rate: float = 1.0
    g_bound: float = 0.0
    momentum: float = 0.9
    warmup: int = 0
    zmg: float = 0.85
    luma: float = 5e-4
    clip: float = 0.0
    agc: float = 0.0
    start: str = "calibrated"
    gain: float = 0.8
    target: float = 1.0
    branch: float = 0.5
    center: bool = True
    depthwise_zero_mean: bool = False
    pointwise_zero_mean: bool = False
    gate: float = 0.0
    head_scale: float = 1.0
    noise: float = 0.0
    seed: int = 0
    split: str = "held_out"


class Images:
    """CIFAR-10 at 16 pixels, in memory, normalised as it is read."""

    def __init__(self, path: Path, split: str) -> None:
        data = torch.load(path)
        self.mean, self.std = (data[k].view(1, 3, 1, 1) * 255 for k in ("mean", "std"))
        count = len(data["train_labels"]) - HELD_OUT
        self.train = data["train_images"][:count], data["train_labels"][:count]
        if split == "test":
            self.test = data["test_images"], data["test_labels"]
        else:
            self.test = data["train_images"][count:], data["train_labels"][count:]

    def inputs(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.train
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order.split(size):
                if steps == 0:
                    return
                if len(chosen) < size:
                    continue
                flips = torch.rand(size, generator=generator) < 0.5
                x = images[chosen]
                x = torch.where(flips.view(-1, 1, 1, 1), x.flip(3), x)
                yield self.inputs(x), labels[chosen]
                steps -= 1


class Trainer(FusedCZMSGD):
    """FusedCZMSGD with a rate and a bound of g's own and a bound on each filter's gradient."""

    def __init__(self, params: Any, settings: Settings) -> None:
        super().__init__(
            params,
            lr=settings.lr,
            momentum=settings.momentum,
            zmg=settings.zmg,
            luma=settings.luma,
        )
        self.settings = settings
        self.start: dict[Tensor, Tensor] = {}

    def _filters(self) -> Iterator[tuple[Tensor, Tensor]]:
        for p, state in self.state.items():
            if "log_scale" in state:
                yield p, state["log_scale"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        s = self.settings
        if s.agc:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None or not p.dim() > 2:
                        continue
                    g = self.state[p].get("log_scale") if p in self.state else None
                    scale = p.flatten(1).norm(dim=1) if g is None else g.exp()
                    norms = p.grad.flatten(1).norm(dim=1) * scale
                    factor = (s.agc / norms.clamp(min=1e-12)).clamp(max=1)
                    p.grad.mul_(factor.view(-1, *[1] * (p.dim() - 1)))
        before = {p: g.clone() for p, g in self._filters()}
        super().step(closure)
        if s.g_rate == 1 and not s.g_bound:
            return None
        for p, g in self._filters():
            if p not in before:
                continue
            first = self.start.setdefault(p, before[p])
            wanted = before[p] + s.g_rate * (g - before[p])
            if s.g_bound:
                wanted = torch.clamp(wanted, first - s.g_bound, first + s.g_bound)
            p.mul_((wanted - g).exp().view(-1, *[1] * (p.dim() - 1)))
            g.copy_(wanted)
        return None


def build(s: Settings, example: Tensor) -> nn.Module:
    torch.manual_seed(s.seed)
    model = NETWORKS[s.network]()
    if s.method == "bn":
        return model.to(memory_format=torch.channels_last)
    converted: Any = convert(model, example_input=example[:2], gain=s.gain)
    model = converted[0] if isinstance(converted, tuple) else converted
    model = model.to(memory_format=torch.channels_last)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for c in convolutions:
            if c.groups == c.in_channels > 1 and not s.depthwise_zero_mean:
                c.weight.uniform_(-1, 1)
                c.weight.mul_(s.gain / c.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
            if s.pointwise_zero_mean and c.kernel_size == (1, 1):
                c.weight.sub_(c.weight.mean(dim=1, keepdim=True))
        if s.start == "calibrated":
            calibrate_(model, example, target=s.target, branch=s.branch, center=s.center)
        if s.gate:
            for n, m in model.named_modules():
                if n.endswith(("fc2", "conv_expand")) or ".fc2" in n:
                    m.weight.mul_(s.gate)
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(s.head_scale)
    return model


def groups_of(model: nn.Module, s: Settings) -> list[dict[str, Any]]:
    groups = []
    for group in czm_param_groups(model):
        if group["name"] != "rest":
            named = list(zip(group["param_names"], group["params"], strict=True))
            depthwise = [
                n
                for n, p in named
                if group["name"] == "spatial" and p.shape[1] == 1 and not s.depthwise_zero_mean
            ]
            for inside in (True, False):
                members = [(n, p) for n, p in named if (n in depthwise) == inside]
                if members:
                    part = dict(group, params=[p for _, p in members])
                    part["param_names"] = [n for n, _ in members]
                    if inside:
                        part.update(name="depthwise", zmg=0.0)
                    groups.append(part)
            continue
        named = list(zip(group["param_names"], group["params"], strict=True))
        for name, lr, dims in (("bias", s.lr_bias, (0, 1)), ("head", s.lr_head, range(2, 9))):
            members = [(n, p) for n, p in named if p.dim() in dims]
            if members:
                rest = {k: v for k, v in group.items()}
                rest.update(
                    name=name,
                    params=[p for _, p in members],
                    param_names=[n for n, _ in members],
                    lr=s.lr if lr is None else lr,
                )
                groups.append(rest)
    return groups


def train(s: Settings, data: Path) -> dict[str, Any]:
    images = Images(data, s.split)
    started = time.perf_counter()
    example = images.inputs(images.train[0][:64])
    model = build(s, example)
    with torch.no_grad():
        model.train(s.method == "bn")
        logits = _spread(model(example))
    if s.method == "bn":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=5e-4
        )
    else:
        optimizer = Trainer(groups_of(model, s), s)
    warmup = max(s.warmup, 1)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / s.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    torch.manual_seed(s.seed)
    losses: list[float] = []
    autocast = s.network not in DEPTHWISE
    for x, y in images.batches(s.steps, s.batch, s.seed):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        loss = F.cross_entropy(out.float(), y)
        optimizer.zero_grad()
        loss.backward()
        if s.clip:
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    model.eval()
    correct = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for x, y in zip(images.test[0].split(500), images.test[1].split(500), strict=True):
            correct += int((model(images.inputs(x)).argmax(1) == y).sum())
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        **asdict(s),
        "logits": logits,
        "loss": sum(tail) / len(tail),
        "accuracy": round(100 * correct / len(images.test[1]), 2),
        "taken": len(losses),
        "seconds": round(time.perf_counter() - started, 1),
    }
