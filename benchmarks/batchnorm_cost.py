"""Count and time what BatchNorm costs a training, against CZM and others in its place.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cached_property

import torch
from batchnorm import agreement, counting, memory, parallel, results
from batchnorm.networks import METHODS, NETWORKS, unavailable
from batchnorm.training import Precision, Training, time_all
from throughput import report
from throughput.arguments import at_least, output, positive, present_device

COMPILE_BACKENDS = ("inductor", "aot_eager_decomp_partition")


class Disagreement(Exception):
    """A method does not compute what it is another form of."""


class Measurement:
    """What is measured of one model, with all its methods on the same images.

    Args:
        model: one of `NETWORKS`.
        device: where.
        batch: images a step.
        image_size: height and width, in pixels.
        precision: of the forward pass.
        backend: of `torch.compile`.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        batch: int,
        image_size: int,
        precision: Precision,
        backend: str,
    ) -> None:
        self.model, self.device = model, device
        self.batch, self.image_size = batch, image_size
        self.precision, self.backend = precision, backend
        self.rows: list[results.Row] = []

    def training(self, method: str, batch: int | None = None) -> Training:
        """Return a training of `method`, always with the same images and weights."""
        batch = batch or self.batch
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator).to(self.device)
        labels = torch.randint(NETWORKS[self.model].classes, (batch,), generator=generator)
        labels = labels.to(self.device)
        return Training(self.model, method, images, labels, self.precision, self.backend)

    @cached_property
    def floor_bytes(self) -> int:
        """What the architecture makes any eager training keep for backward."""
        floor = self.training("floor")
        with self.precision.context(self.device):
            return counting.floor_bytes(floor.model, floor.images)

    def add(self, method: str, metric: str, value: float, unit: str) -> None:
        """Append a row."""
        row = (self.model, method, self.device.type, self.precision.dtype, self.batch)
        self.rows.append(dict(zip(results.KEYS, (*row, metric, value, unit), strict=True)))

    def check(self, training: Training) -> None:
        """Check a method against the one that it is another form of.

        Raises:
            Disagreement: their losses or gradients differ.
        """
        same_as = METHODS[training.method].same_as
        problem = same_as and agreement.disagreement(training, self.training(same_as))
        if problem:
            raise Disagreement(f"{self.model}: {problem}")

    def count(self, training: Training) -> None:
        """Count what a method keeps, runs and sends."""
        method, images = training.method, training.images
        # The optimizer's state belongs to the first step.
        training.step()
        with self.precision.context(self.device):
            saved = counting.saved_bytes(training.model, images)
        self.add(method, "saved_bytes", saved, "bytes")
        self.add(method, "floor_bytes", self.floor_bytes, "bytes")
        self.add(method, "peak_bytes", memory.peak_bytes(training), "bytes")
        # A dispatch mode would keep torch.compile from compiling; what is sent is the same.
        if METHODS[method].compiled:
            return
        self.add(method, "operators", counting.operators(training.forward_backward), "operators")
        training.optimizer.zero_grad()
        number, nbytes = parallel.collectives(training.model, images)
        self._add_collectives(method, number, nbytes)
        if method == "batchnorm":
            more, more_bytes = parallel.synchronised_statistics(training.model)
            self._add_collectives("sync_batchnorm", number + more, nbytes + more_bytes)

    def _add_collectives(self, method: str, number: int, nbytes: int) -> None:
        self.add(method, "collectives", number, "collectives")
        self.add(method, "collective_bytes", nbytes, "bytes")

    def time(self, trainings: Sequence[Training], seconds: float) -> None:
        """Time all methods in turn."""
        for metric, medians in time_all(trainings, seconds).items():
            for method, microseconds in medians.items():
                self.add(method, metric, microseconds, "us")

    def fit(self, methods: Sequence[str], nbytes: int) -> None:
        """Find the largest batch of each eager method that a GPU's memory holds."""
        # Compiled methods would be compiled anew for every batch that is tried.
        for method in (each for each in methods if not METHODS[each].compiled):
            found = memory.largest_batch(lambda batch, m=method: self.training(m, batch), nbytes)
            self.add(method, "largest_batch", found, "images")


def measure(measurement: Measurement, methods: Sequence[str], seconds: float) -> None:
    """Check and count every method, then time them all together.

    Args:
        measurement: where the rows go.
        methods: of `METHODS`.
        seconds: for how long to time; 0 not to, and not to keep all networks in memory.

    Raises:
        Disagreement: a method computes something else than it should.
    """
    trainings = []
    for method in methods:
        training = measurement.training(method)
        measurement.check(training)
        measurement.count(training)
        if seconds > 0:
            trainings.append(training)
    if trainings:
        measurement.time(trainings, seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", nargs="+", default=["resnet20"], choices=(*NETWORKS, "all"),
        help="default: resnet20",
    )  # fmt: skip
    parser.add_argument(
        "--method", nargs="+", choices=METHODS,
        help="default: all that can be had, those under torch.compile only with --compile",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=at_least(int, 1),
        help="in pixels (default: 32 for CIFAR's networks, 64 for torchvision's)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=at_least(int, 2),
        help="images a step (default: 128 for resnet20, 32 for resnet110, 8 for torchvision's)",
    )  # fmt: skip
    parser.add_argument("--threads", type=at_least(int, 1), help="of torch (default: torch's own)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--autocast", default="", choices=("bfloat16", "float16"),
        help="of the forward pass (default: float32 throughout)",
    )  # fmt: skip
    parser.add_argument("--channels-last", action="store_true", help="of images and weights")
    parser.add_argument(
        "--seconds", type=at_least(float, 0), default=60.0,
        help="of timing for each model; 0 counts and does not time (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="?", const=COMPILE_BACKENDS[0], choices=COMPILE_BACKENDS,
        help="measure the methods under torch.compile as well; aot_eager_decomp_partition keeps "
        "for backward what Inductor keeps, and compiles no kernel (default: inductor)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=positive(float), metavar="GB",
        help="of a GPU: find the largest batch of each method that it holds",
    )  # fmt: skip
    parser.add_argument("--json", type=output, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=output, metavar="FILE.png", help="draw bytes and times")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = present_device(parser, options.device)
    if options.memory and device.type != "cuda":
        parser.error("--memory needs --device cuda: a CPU's memory has no limit of its own")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.plot:
        try:
            report.require_matplotlib()
        except ImportError as error:
            parser.error(str(error))

    facts = report.machine(device)
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n", end="\n\n", flush=True)
    precision = Precision(options.autocast, options.channels_last)
    backend = options.compile or COMPILE_BACKENDS[0]
    rows: list[results.Row] = []
    for model in NETWORKS if "all" in options.model else dict.fromkeys(options.model):
        network = NETWORKS[model]
        methods = _methods(model, options.method, compiled=options.compile is not None)
        if methods is None:
            return 1
        measurement = Measurement(
            model,
            device,
            options.batch or network.batch,
            options.image_size or network.image_size,
            precision,
            backend,
        )
        try:
            measure(measurement, methods, options.seconds)
            # What has been compiled for one model counts against the limit of the next.
            torch.compiler.reset()
        except (ImportError, Disagreement) as error:
            print(error, file=sys.stderr)
            return 1
        if options.memory:
            measurement.fit(methods, int(options.memory * 1e9))
        rows += measurement.rows
        print(results.describe(measurement.rows, measurement.image_size))
        print(results.table(measurement.rows, model), end="\n\n", flush=True)
    if not options.memory:
        print("largest batch: not measured; it needs --memory and a GPU")

    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        results.plot(rows, facts, options.plot)
    return 0


def _methods(model: str, asked: Sequence[str] | None, compiled: bool) -> list[str] | None:
    """Return the methods to measure, and say what is left out; None if one asked for is."""
    methods = []
    for method in dict.fromkeys(asked or METHODS):
        if not asked and METHODS[method].compiled and not compiled:
            continue
        reason = unavailable(model, method)
        if reason is None:
            methods.append(method)
        elif asked:
            print(f"{model}: no {method}: {reason}", file=sys.stderr)
            return None
        else:
            print(f"{model}: without {method}: {reason}")
    return methods


if __name__ == "__main__":
    sys.exit(main())
