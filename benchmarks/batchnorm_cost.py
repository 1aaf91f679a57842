"""Count and time what BatchNorm costs a training, against CZM and others in its place.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from batchnorm import counting, results
from batchnorm.networks import METHODS, NETWORKS, build
from batchnorm.training import Training, time_all
from throughput import report
from throughput.arguments import at_least, output


def measure(
    model: str,
    methods: Sequence[str],
    device: torch.device,
    batch: int,
    image_size: int,
    seconds: float,
) -> list[results.Row]:
    """Count what every method keeps and runs, then time them all, and return the rows.

    Args:
        model: one of `NETWORKS`.
        methods: of `METHODS`.
        device: where.
        batch: images a step.
        image_size: height and width, in pixels.
        seconds: for how long to time; 0 not to.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator).to(device)
    labels = torch.randint(NETWORKS[model].classes, (batch,), generator=generator).to(device)
    floor = counting.floor_bytes(build(model, "floor", image_size).to(device), images)

    trainings = [Training(model, method, images, labels) for method in methods]
    rows = []

    def add(method: str, metric: str, value: float, unit: str) -> None:
        row = (model, method, device.type, "float32", batch, metric, value, unit)
        rows.append(dict(zip(results.KEYS, row, strict=True)))

    for training in trainings:
        # Compilation and the optimizer's state belong to the first step.
        training.step()
        saved = counting.saved_bytes(training.model, images)
        add(training.method, "saved_bytes", saved, "bytes")
        add(training.method, "floor_bytes", floor, "bytes")
        # A dispatch mode would keep torch.compile from compiling.
        if not METHODS[training.method].compiled:
            count = counting.operators(training.forward_backward)
            add(training.method, "operators", count, "operators")
        training.optimizer.zero_grad()
    if seconds > 0:
        for metric, medians in time_all(trainings, seconds).items():
            for method, microseconds in medians.items():
                add(method, metric, microseconds, "us")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", nargs="+", default=["resnet20"], choices=(*NETWORKS, "all"),
        help="default: resnet20",
    )  # fmt: skip
    parser.add_argument(
        "--method", nargs="+", choices=METHODS,
        help="default: all, those under torch.compile only with --compile",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=at_least(int, 1),
        help="in pixels (default: 32 for CIFAR's networks, 64 for torchvision's)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=at_least(int, 2),
        help="images a step (default: 32 for CIFAR's networks, 8 for torchvision's)",
    )  # fmt: skip
    parser.add_argument("--threads", type=at_least(int, 1), help="of torch (default: torch's own)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--seconds", type=at_least(float, 0), default=60.0,
        help="of timing for each model; 0 counts and does not time (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="measure the methods under torch.compile as well"
    )
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=output, metavar="FILE.png", help="draw bytes and times")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device on this machine")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.plot:
        try:
            report.require_matplotlib()
        except ImportError as error:
            parser.error(str(error))

    models = NETWORKS if "all" in options.model else dict.fromkeys(options.model)
    methods = list(dict.fromkeys(options.method or METHODS))
    if not (options.method or options.compile):
        methods = [method for method in methods if not METHODS[method].compiled]
    facts = report.machine(device)
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", end="\n\n", flush=True)
    rows: list[results.Row] = []
    for model in models:
        batch = options.batch or NETWORKS[model].batch
        image_size = options.image_size or NETWORKS[model].image_size
        try:
            found = measure(model, methods, device, batch, image_size, options.seconds)
        except ImportError as error:
            print(f"{model}: {error}", file=sys.stderr)
            return 1
        rows += found
        floor = next(row["value"] for row in found if row["metric"] == "floor_bytes")
        print(
            f"{model}, batch {batch}, {image_size} pixels: the architecture's floor is "
            f"{floor / 1e6:.3f} MB saved for backward"
        )
        print(results.table(found, model), end="\n\n", flush=True)

    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        results.plot(rows, facts, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
