"""Show what a network without batch statistics can do, and one with BatchNorm cannot.

See README.md beside this file for what is compared and how.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from common import plot
from common.options import Options, parse
from common.rows import Results, Row, frame
from common.table import table
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from czm_fused import FusedCZMSGD, czm_param_groups
from czm_fused.models import cifar_resnet
from czm_fused.training.data import digits

NORMS = ("czm", "bn")
BATCH = 128
MICRO_BATCH = 16
PROCESSES = 2
LEARNING_RATE = 0.05
MOMENTUM = 0.9
DEPTH = 8
# What is compared, by metric.
TITLES = {
    "accumulated": f"{BATCH // MICRO_BATCH} micro-batches of {MICRO_BATCH}",
    "data_parallel": f"{PROCESSES} processes with {BATCH // PROCESSES} each",
    "single_image": "loss after 5 steps on one image alone, of the first",
    "train_eval": "outputs in training mode against eval mode",
}


@dataclass(kw_only=True)
class StatisticsOptions(Options):
    """Options of the benchmark of batch statistics."""

    steps: int = 7
    """Of the epoch; scikit-learn's digits have 7 batches of 128."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and images."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "steps")
        if self.device != "cpu":
            raise ValueError("--device must be cpu: the processes meet over gloo")


def images_and_labels(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the first `count` of scikit-learn's handwritten digits, of values 0 to 1."""
    train = digits().train
    return train.pixels[:count].to(dtype) / 16, train.labels[:count]


def build(norm: str, dtype: torch.dtype) -> nn.Module:
    """Return a CIFAR ResNet for digits without noise, always with the same weights."""
    torch.manual_seed(0)
    return cifar_resnet(DEPTH, norm, in_channels=1).to(dtype)


def flat(model: nn.Module) -> Tensor:
    """Return all weights in one tensor, in float64."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def train(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    add_gradients: Callable[[Tensor, Tensor], None],
) -> Tensor:
    """Take a step for each batch, and return all weights."""
    optimizer = FusedCZMSGD(czm_param_groups(model), lr=LEARNING_RATE, momentum=MOMENTUM)
    for images, labels in batches:
        optimizer.zero_grad()
        add_gradients(images, labels)
        optimizer.step()
    return flat(model)


def epoch(norm: str, batches: Sequence[tuple[Tensor, Tensor]], micro_batch: int) -> Tensor:
    """Return the weights after an epoch whose batches are taken `micro_batch` images at a time."""
    model = build(norm, batches[0][0].dtype)

    def add_gradients(images: Tensor, labels: Tensor) -> None:
        for x, y in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            (F.cross_entropy(model(x), y) * (len(x) / len(images))).backward()

    return train(model, batches, add_gradients)


def data_parallel_epoch(norm: str, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the weights after the same epoch, every process taking its share of each batch."""
    model = build(norm, batches[0][0].dtype)
    parallel = DistributedDataParallel(model)
    rank, size = dist.get_rank(), dist.get_world_size()

    def add_gradients(images: Tensor, labels: Tensor) -> None:
        x, y = images.chunk(size)[rank], labels.chunk(size)[rank]
        F.cross_entropy(parallel(x), y).backward()

    return train(model, batches, add_gradients)


def _run_process(rank: int, folder: str, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=5),
    )
    weights = {norm: data_parallel_epoch(norm, batches) for norm in NORMS}
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.destroy_process_group()


def in_processes(batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of `data_parallel_epoch` for each of `NORMS`, in gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_process, (folder, batches), nprocs=PROCESSES)
        weights: dict[str, Tensor] = torch.load(f"{folder}/weights.pt")
    return weights


def difference(norm: str, weights: Tensor, expected: Tensor) -> float:
    """Return how far apart two ends of a training are, as a share of the way from its beginning."""
    start = flat(build(norm, torch.float64))
    return float((weights - expected).norm() / (expected - start).norm())


def single_image(norm: str, steps: int) -> float:
    """Return the loss after training on one digit alone, of the loss before; NaN if that fails."""
    images, labels = images_and_labels(1, torch.float32)
    # Of four pixels the last stage sees one: one number a channel.
    images = images[:, :, 2:6, 2:6]
    model = build(norm, torch.float32)
    losses = []

    def add_gradients(images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())

    try:
        train(model, [(images, labels)] * steps, add_gradients)
    except ValueError:  # BatchNorm: "Expected more than 1 value per channel when training"
        return math.nan
    return losses[-1] / losses[0]


def train_and_eval(norm: str) -> float:
    """Return how far the outputs of a new network in training and in eval mode are apart."""
    images, _ = images_and_labels(BATCH, torch.float32)
    model = build(norm, torch.float32)
    with torch.no_grad():
        training, evaluation = model.train()(images), model.eval()(images)
    return float((training - evaluation).norm() / evaluation.norm())


def compare(results: Results, steps: int, dtype: torch.dtype) -> None:
    """Make all comparisons, and add their rows."""
    images, labels = images_and_labels(steps * BATCH, dtype)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    parallel = in_processes(batches)
    for norm in NORMS:
        whole = epoch(norm, batches, BATCH)
        accumulated = epoch(norm, batches, MICRO_BATCH)
        found = {
            "accumulated": difference(norm, accumulated, whole),
            "data_parallel": difference(norm, parallel[norm], whole),
            "single_image": single_image(norm, 5),
            "train_eval": train_and_eval(norm),
        }
        name = str(dtype).removeprefix("torch.")
        for metric, value in found.items():
            results.add("resnet8", norm, metric, "relative", value, dtype=name, steps=steps)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw how far apart the weights end, as a share of the way they went."""
    metrics = ["accumulated", "data_parallel"]
    plot.compare(frame(rows), path, metrics, titles=TITLES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    options = parse(StatisticsOptions, arguments, "Train an epoch in parts, and on one image.")
    results = Results("without_statistics", options.torch_device, options.json)
    compare(results, options.steps, getattr(torch, options.dtype))
    rows = frame(results.rows)
    print(table(rows), *(f"{metric}: {text}" for metric, text in TITLES.items()), sep="\n")
    if options.plot:
        draw(results.rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
