"""Show where weights of low precision stop learning, and what keeps them going.

A small network computes its gradients from bfloat16 weights and takes small steps. Every way to
keep the weights meets the same images in the same order; the float32 training is what they are held
against. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from czm_fused.ops.step.reference import exact_param
from throughput.arguments import output, positive
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, czm_init_, czm_param_groups

CLASSES = 10
IMAGES = 512
BATCH = 64
EVERY = 25


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
    """Train, and give every `EVERY` steps their number and the loss on all images."""
    images, labels = task()
    order = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        batch = torch.randint(IMAGES, (BATCH,), generator=order)
        kept.model.zero_grad()
        F.cross_entropy(kept.model(images[batch].to(kept.dtype)).float(), labels[batch]).backward()
        kept.step()
        if step % EVERY == 0:
            with torch.no_grad():
                logits = kept.model(images.to(kept.dtype)).float()
            yield step, F.cross_entropy(logits, labels).item()


def distance(weights: list[Tensor], others: list[Tensor], begin: list[Tensor]) -> float:
    """Return how far `weights` are from `others`, as a share of how far these are from `begin`."""
    pairs = [list(zip(x, others, strict=True)) for x in (weights, begin)]
    apart, gone = (sum((a - b).square().sum().item() for a, b in each) ** 0.5 for each in pairs)
    return apart / gone


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw the losses of all ways."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = ["-", "-", "-.", "--", ":"]
    for row, style in zip(rows, styles, strict=True):
        axes.plot(row["steps"], row["losses"], style, label=row["weights"])
    axes.set(xlabel="step", ylabel="loss on all images", title="weights kept in few bits")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in all ways, print a table, write rows and the plot; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive(int), default=3000, help="(default: 3000)")
    parser.add_argument("--lr", type=positive(float), default=1e-4, help="(default: 1e-4)")
    parser.add_argument("--json", type=output, help="write the rows to this file")
    parser.add_argument("--plot", type=output, help="draw the losses into this file")
    options = parser.parse_args(arguments)

    rows: list[dict[str, object]] = []
    begin = [p.detach() for p in network().parameters()]
    exact: list[Tensor] = []
    print(f"{'weights':28}{'loss':>10}{'off float32':>14}{'bytes kept':>12}{'moved a step':>14}")
    for name, way in WAYS.items():
        kept = way(options.lr)
        curve = list(train(kept, options.steps))
        exact = exact or kept.weights()
        off = distance(kept.weights(), exact, begin)
        rows.append(
            {
                "weights": name,
                "lr": options.lr,
                "steps": [step for step, _ in curve],
                "losses": [loss for _, loss in curve],
                "distance_to_float32": off,
                "kept_bytes_a_weight": kept.state_bytes,
                "moved_bytes_a_weight": kept.moved_bytes,
            }
        )
        print(
            f"{name:28}{curve[-1][1]:10.4f}{off:14.2e}{kept.state_bytes:12}{kept.moved_bytes:14}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
