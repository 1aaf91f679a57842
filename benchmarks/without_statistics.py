"""Show what a network without batch statistics can do, and one with BatchNorm cannot.

See README.md beside this file for what is compared and how.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from throughput.arguments import at_least, output, positive
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from czm_fused import FusedCZMSGD, czm_param_groups
from czm_fused._internal.text import format_table
from czm_fused.models import cifar_resnet
from czm_fused.training.data import digits

NORMS = ("czm", "bn")
BATCH = 128
MICRO_BATCH = 16
PROCESSES = 2
LEARNING_RATE = 0.05
MOMENTUM = 0.9
DEPTH = 8
# How a batch is taken, of those that a whole batch is compared with.
PARTS = {
    "accumulated": f"{BATCH // MICRO_BATCH} micro-batches of {MICRO_BATCH}",
    "data_parallel": f"{PROCESSES} processes with {BATCH // PROCESSES} each",
}
KEYS = ("norm", "what", "dtype", "steps", "value")

Row = dict[str, Any]


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
        torch.multiprocessing.spawn(_run_process, (folder, batches), nprocs=PROCESSES)
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


def compare(steps: int, dtype: torch.dtype) -> list[Row]:
    """Make all comparisons, and return their rows."""
    images, labels = images_and_labels(steps * BATCH, dtype)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    parallel = in_processes(batches)
    rows = []
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
        rows += [
            dict(zip(KEYS, (norm, what, name, steps, value), strict=True))
            for what, value in found.items()
        ]
    return rows


_DESCRIPTIONS = {
    **{part: f"weights: {text}, against a batch of {BATCH}" for part, text in PARTS.items()},
    "single_image": "loss after 5 steps on one image alone, of the first",
    "train_eval": "outputs: training mode against eval mode",
}


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out with a column for each norm."""
    values = {(row["what"], row["norm"]): row["value"] for row in rows}
    cells = [["relative difference", *NORMS]]
    for what, description in _DESCRIPTIONS.items():
        cells.append([description, *(_format(values[what, norm]) for norm in NORMS)])
    return format_table(cells, right_aligned=range(1, len(NORMS) + 1))


def _format(value: float) -> str:
    return "impossible" if math.isnan(value) else f"{value:.1e}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the differences of the weights as bars on a logarithmic axis, as a PNG."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["what"] in PARTS][::-1]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    norms = {"czm": "CZM", "bn": "BatchNorm"}
    bars = axes.barh(
        [f"{norms[row['norm']]}, {PARTS[row['what']]}" for row in shown],
        [row["value"] for row in shown],
        color=["C1" if row["norm"] == "czm" else "C0" for row in shown],
    )
    axes.bar_label(bars, [f" {row['value']:.0e}" for row in shown])
    axes.set_xscale("log")
    axes.margins(x=0.12)
    epsilon = torch.finfo(getattr(torch, shown[0]["dtype"])).eps
    axes.axvline(epsilon, color="0.2", linestyle="--", linewidth=1)
    axes.set_title(f"An epoch in parts, against the same epoch in batches of {BATCH}", loc="left")
    axes.set_xlabel(
        f"how far apart the weights end, as a share of the way they went in {shown[0]['steps']} "
        f"steps (dashed: eps of {shown[0]['dtype']})"
    )
    figure.savefig(path, format="png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=at_least(int, 1), default=7,
        help="of the epoch; scikit-learn's digits have 7 batches of 128 (default: 7)",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--threads", type=positive(int), help="of torch (default: torch's own)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=output, metavar="FILE.png", help="draw the differences")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = compare(options.steps, getattr(torch, options.dtype))
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        # JSON has no NaN.
        for row in rows:
            row["value"] = None if math.isnan(row["value"]) else row["value"]
        options.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
