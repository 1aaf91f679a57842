"""Show where weights of low precision stop learning, and what keeps them going.

A small network computes its gradients from bfloat16 weights and takes small steps. Every way to
keep the weights meets the same images in the same order; the float32 training is what they are held
against. See README.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import plot
from common.options import Options, parse
from common.rows import Results, Row, frame
from common.table import table
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, czm_init_, czm_param_groups
from czm_fused.ops.step.reference import exact_param

CLASSES = 10
IMAGES = 512
BATCH = 64
EVERY = 100


@dataclass(kw_only=True)
class PrecisionOptions(Options):
    """Options of the benchmark of low precision."""

    steps: int = 3000
    """Of each training."""
    lr: float = 1e-4
    """Learning rate, small enough for steps that bfloat16 rounds away."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "steps")
        self.at_least(0, "lr")


def task() -> tuple[Tensor, Tensor]:
    """Return images `(512, 1, 8, 8)` and the classes that a random network gives them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 1, 8, 8, generator=generator)
    hidden = torch.randn(64, 128, generator=generator) / 8
    output = torch.randn(128, CLASSES, generator=generator)
    return images, ((images.flatten(1) @ hidden).relu() @ output).argmax(dim=1)


def network() -> nn.Module:
    """Return a network without BatchNorm, always of the same weights, which bfloat16 has too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, CLASSES),
    )  # fmt: skip
    czm_init_(model, stem="0")
    return model.bfloat16().float()


class Kept:
    """A training whose weights are kept in one way.

    Subclasses say how: `weights` are float32 numbers that stand for those that learn.

    Attributes:
        state_bytes: kept for each weight, with the weight that the network computes with, without
            momentum and gradient.
        moved_bytes: read and written in a step for each weight, gradient and momentum included.
    """

    dtype = torch.bfloat16
    master_weights = False
    state_bytes = 2
    moved_bytes = 10

    def __init__(self, lr: float) -> None:
        self.model = network().to(self.dtype)
        self.optimizer = self.make_optimizer(self.model, lr)

    def make_optimizer(self, model: nn.Module, lr: float) -> FusedCZMSGD:
        """Return the optimizer of a model's parameters."""
        groups = czm_param_groups(model, stem="0")
        return FusedCZMSGD(groups, lr=lr, momentum=0.9, master_weights=self.master_weights)

    def step(self) -> None:
        """Step the weights by the gradients of the model."""
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        """Return the weights that learn, in float32."""
        return [p.detach().float() for p in self.model.parameters()]


class Float32(Kept):
    """float32 weights, that the network computes with: what the others are held against."""

    dtype = torch.float32
    state_bytes = 4
    moved_bytes = 20


class BFloat16(Kept):
    """bfloat16 weights, rounded at every step."""


class Remainder(Kept):
    """bfloat16 weights, and the other 16 bits of their float32 values: `master_weights=True`."""

    master_weights = True
    state_bytes = 4
    moved_bytes = 14

    def weights(self) -> list[Tensor]:
        """Return the weights that learn, in float32."""
        state = self.optimizer.state
        return [
            exact_param(p.detach(), state[p]["param_remainder"]) for p in self.model.parameters()
        ]


class Lost(Kept):
    """bfloat16 weights, and what their rounding lost, in a dtype of its own, here step by step.

    Attributes:
        lost_dtype: of what was lost.
    """

    lost_dtype = torch.bfloat16
    state_bytes = 4
    moved_bytes = 14

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.lost = [torch.zeros_like(p, dtype=self.lost_dtype) for p in self.model.parameters()]
        self.float32 = network()
        self.optimizer = self.make_optimizer(self.float32, lr)

    def weights(self) -> list[Tensor]:
        """Return the weights that learn, in float32."""
        return [
            p.detach().float() + lost
            for p, lost in zip(self.model.parameters(), self.lost, strict=True)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Step the weights by the gradients of the model."""
        steps = list(
            zip(self.model.parameters(), self.lost, self.float32.parameters(), strict=True)
        )
        for param, lost, weight in steps:
            weight.copy_(param.float() + lost)
            assert param.grad is not None
            weight.grad = param.grad.float()
        self.optimizer.step()
        for param, lost, weight in steps:
            param.copy_(weight)
            lost.copy_(weight - param.float())
            # As the others keep it.
            momentum = self.optimizer.state[weight]["momentum_buffer"]
            momentum.copy_(momentum.bfloat16())


class Master(Lost):
    """bfloat16 weights, and float32 ones beside them."""

    lost_dtype = torch.float32
    state_bytes = 6
    moved_bytes = 16


WAYS: dict[str, type[Kept]] = {
    "float32": Float32,
    "bfloat16": BFloat16,
    "bfloat16, Kahan": Lost,
    "bfloat16, master_weights": Remainder,
    "bfloat16 beside float32": Master,
}


def train(kept: Kept, steps: int) -> Iterator[tuple[int, float]]:
    """Train; yield step and loss on all images, every `EVERY` steps and at the end."""
    images, labels = task()
    order = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        batch = torch.randint(IMAGES, (BATCH,), generator=order)
        kept.model.zero_grad()
        F.cross_entropy(kept.model(images[batch].to(kept.dtype)).float(), labels[batch]).backward()
        kept.step()
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                logits = kept.model(images.to(kept.dtype)).float()
            yield step, F.cross_entropy(logits, labels).item()


def distance(weights: list[Tensor], others: list[Tensor], begin: list[Tensor]) -> float:
    """Return how far `weights` are from `others`, as a share of how far these are from `begin`."""
    pairs = [list(zip(x, others, strict=True)) for x in (weights, begin)]
    apart, gone = (sum((a - b).square().sum().item() for a, b in each) ** 0.5 for each in pairs)
    return apart / gone


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the losses of all ways."""
    losses = frame(row for row in rows if row.metric == "loss")
    losses = losses.rename(columns={"provider": "weights kept as"})
    plot.curves(losses, path, "step", "weights kept as", "loss on all images")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    options = parse(PrecisionOptions, arguments, "Train with weights kept in few bits.")
    results = Results("low_precision", torch.device("cpu"), options.json)
    begin = [p.detach() for p in network().parameters()]
    exact: list[Tensor] = []
    for name, way in WAYS.items():
        kept = way(options.lr)

        def add(metric: str, unit: str, value: float, name: str = name, **config: int) -> None:
            results.add("small_cnn", name, metric, unit, value, lr=options.lr, **config)

        for step, loss in train(kept, options.steps):
            add("loss", "nats", loss, step=step)
        exact = exact or kept.weights()
        off = distance(kept.weights(), exact, begin)
        add("off_float32", "of the way", off, step=options.steps)
        add("kept", "bytes a weight", kept.state_bytes, step=options.steps)
        add("moved", "bytes a weight", kept.moved_bytes, step=options.steps)
    rows = frame(results.rows)
    print(table(rows[rows["step"] == options.steps]))
    if options.plot:
        draw(results.rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
