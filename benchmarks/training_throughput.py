"""Time czm-train's step loop, with each option of speed, against a plain PyTorch loop.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from common import counting, images, plot, timing
from common.agreement import DisagreementError, require
from common.options import Options, parse
from common.plain_loop import PlainTraining
from common.rows import Results, frame
from common.speed import Speed, combinations
from common.table import table

from czm_fused.models import blocks_per_stage
from czm_fused.training import data
from czm_fused.training.config import Config
from czm_fused.training.errors import TrainingError
from czm_fused.training.trainer import Trainer

# Weights stay where they are for thousands of steps.
TIMED_RATE = 1e-4
# Enough to learn something in a few steps.
CHECKED_RATE = 0.01
# Deep networks with BatchNorm amplify rounding a thousandfold in these few steps.
CHECKED_DEPTH = 8
CHECKED_EPOCHS = 3
# Of a training of 200 epochs on CIFAR.
_IMAGES = 200 * 50_000


@dataclass(kw_only=True)
class ThroughputOptions(Options):
    """Options of the benchmark of the training loop."""

    depth: int = 20
    """Of the network, 6n + 2."""
    data_dir: Path | None = None
    """Train on images of DIR/train/<class>/; synthetic ones by default."""
    batch: int = 128
    """Images a step."""
    steps: int = 8
    """In the short epoch that is timed."""
    workers: tuple[int, ...] = (0, 2)
    """Of the plain loop's DataLoader, a row each."""
    compile: bool = False
    """Measure rows under torch.compile as well."""
    options: tuple[str, ...] = ()
    """Measure these rows alone, such as channels_last+bfloat16; all by default."""
    rounds: int = 200
    """At most."""
    seconds: float = 300.0
    """After how long no further round begins; a sixth of it is for the input alone."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "steps", "rounds")
        self.at_least(2, "batch")
        self.at_least(0, "seconds")
        if any(count < 0 for count in self.workers):
            raise ValueError(f"--workers must be 0 or more, but was {min(self.workers)}")
        blocks_per_stage(self.depth)
        self.speeds()

    def speeds(self) -> list[Speed]:
        """Return the options of speed that are measured.

        Raises:
            ValueError: `--options` has an unknown name.
        """
        known = combinations(self.torch_device, self.compile or bool(self.options))
        unknown = set(self.options) - known.keys()
        if unknown:
            raise ValueError(
                f"--options has no {', '.join(sorted(unknown))}: choose from {', '.join(known)}"
            )
        return [known[name] for name in dict.fromkeys(self.options or known)]


class Training(Protocol):
    """One way to train.

    Attributes:
        provider: as rows name it.
        speed: its options.
        workers: processes that load its images.
    """

    provider: str
    speed: Speed
    workers: int

    def epoch(self) -> float:
        """Train on every image once; return the mean loss."""

    def input(self) -> None:
        """Load every image once, and train on none."""


class CZMTraining:
    """`czm-train`'s own loop, an epoch at a time.

    Args:
        method: as `czm-train` knows it.
        depth: of the network.
        source: images on the CPU; they are moved to the device once.
        options: batch and device are used.
        speed: options of speed.
        given: other settings of `czm-train`.
    """

    workers = 0

    def __init__(
        self,
        method: str,
        depth: int,
        source: data.Images,
        options: ThroughputOptions,
        speed: Speed,
        **given: object,
    ) -> None:
        self.provider = "czm_train" if method == "czmig" else f"czm_train_{method}"
        self.speed = speed
        settings: dict[str, Any] = {
            "method": method,
            "dataset": "cifar10",
            "depth": depth,
            "batch_size": options.batch,
            "crop_padding": images.CROP_PADDING,
            "last_batch": "keep",
            **speed.settings(),
            **given,
        }
        moved = source.to(options.torch_device)
        where = data.DataSet(moved, moved, images.CLASSES), options.torch_device
        self.trainer = Trainer(Config(**settings), *where)

    def epoch(self) -> float:
        """Train on every image once; return the mean loss."""
        return self.trainer.train_epoch()[0]

    def input(self) -> None:
        """Gather, augment and normalise every image once, and train on none."""
        batches = self.trainer.batches
        for indices in batches.training():
            pixels, _ = batches.load_training(indices)
            batches.normalise(pixels).contiguous(memory_format=self.trainer.memory_format)


def trainings(
    depth: int, source: data.Images, options: ThroughputOptions, lr: float, **czmig: float
) -> Iterable[Training]:
    """Yield everything that is compared.

    Args:
        depth: of the networks.
        source: the images.
        options: of the run.
        lr: learning rate of all.
        czmig: other settings of the method czmig.
    """
    for speed in options.speeds():
        for method, more in (("czmig", {"head_lr": lr, **czmig}), ("bn", {})):
            yield CZMTraining(method, depth, source, options, speed, lr=lr, **more)
        if not speed.cuda_graph:
            for workers in dict.fromkeys(options.workers):
                where = (depth, source, options.batch, options.torch_device, speed)
                yield PlainTraining(*where, workers=workers, lr=lr)


def check(compared: Iterable[Training]) -> None:
    """Train each for some epochs, and compare its losses with those of its provider's first.

    Losses may differ by what the options round: with factors of 8 bits (bfloat16) or 11 bits (TF32)
    by 16 units of those; in float32, where an epoch's steps amplify the order of sums, by 1e-3.

    Raises:
        DisagreementError: a loss is not finite, does not fall, or is another.
    """
    expected: dict[tuple[str, int], np.ndarray] = {}
    for training in compared:
        name = f"{training.provider} with {training.speed}"
        losses = np.array([training.epoch() for _ in range(CHECKED_EPOCHS)])
        if not (np.isfinite(losses).all() and losses[-1] < losses[0]):
            raise DisagreementError(f"{name} does not learn: its losses were {losses}")
        known = expected.setdefault((training.provider, training.workers), losses)
        bound = 1e-3
        if training.speed.autocast != "off":
            bound = 16 * 2**-8
        elif training.speed.tf32:
            bound = 16 * 2**-11
        error = float(np.abs(losses / known - 1).max())
        require(name, "the training without options, by its losses", error, bound)


def measure(
    results: Results, compared: Sequence[Training], options: ThroughputOptions
) -> None:
    """Time short epochs of all trainings in interleaved rounds, then their input alone."""
    # An epoch has a stream of its own, which events in the current one would not see.
    timer = timing.ClockTimer(options.torch_device)
    seconds, steps = options.seconds / 6, options.steps
    epochs, _ = timing.time_rounds([t.epoch for t in compared], timer, options.rounds, 5 * seconds)
    inputs, _ = timing.time_rounds([t.input for t in compared], timer, options.rounds, seconds)
    speeds = {}
    for number, training in enumerate(compared):
        step = epochs[:, number] / steps
        config: dict[str, Any] = {
            "options": str(training.speed),
            "workers": training.workers,
            "batch": options.batch,
            "steps": steps,
        }

        def add(metric: str, unit: str, values: Any, t: Training = training, **more: Any) -> None:
            results.add(f"resnet{options.depth}", t.provider, metric, unit, values, **more)

        add("step", "us", step, **config)
        add("input", "us", inputs[:, number] / steps, **config)
        add("throughput", "images/s", options.batch / step * 1e6, **config)
        add("200_epochs", "s", math.ceil(_IMAGES / options.batch) * step / 1e6, **config)
        if options.device == "cuda":
            for metric, value in counting.device_work(training.epoch, 1).items():
                add(metric, "us" if metric == "profiled" else metric, value / steps, **config)
        speeds[training.provider, str(training.speed), training.workers] = float(np.median(step))
    for (provider, speed, workers), median in speeds.items():
        # Like with like: the plain loop has no CUDA graph.
        alike = "+".join(each for each in speed.split("+") if each != "cuda_graph") or "float32"
        for metric, rival in (("speedup", alike), ("speedup_of_defaults", "float32")):
            plain = [us for (p, s, _), us in speeds.items() if p == "pytorch" and s == rival]
            config = {"options": speed, "workers": workers, "batch": options.batch, "steps": steps}
            factor = min(plain) / median if plain else None
            results.add(f"resnet{options.depth}", provider, metric, "x", factor, **config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a training does not train what it should."""
    options = parse(ThroughputOptions, arguments, "Time czm-train against a plain PyTorch loop.")
    count = options.steps * options.batch
    try:
        folder = options.data_dir
        source = images.from_folder(folder, count) if folder else images.synthetic(count)
    except (ValueError, TrainingError) as error:
        print(error, file=sys.stderr)
        return 2
    results = Results("training_throughput", options.torch_device, options.json)
    print(results.machine, end="\n\n", flush=True)
    try:
        # A compiled network draws other noise.
        check(trainings(CHECKED_DEPTH, source, options, CHECKED_RATE, noise=0.0))
    except DisagreementError as error:
        print(error, file=sys.stderr)
        return 1
    measure(results, list(trainings(options.depth, source, options, TIMED_RATE)), options)
    rows = frame(results.rows)
    print(table(rows, ("provider", "options", "workers")))
    if options.plot:
        rows["workers"] = rows["workers"].map(lambda count: f"{count} workers" if count else "")
        label = ("provider", "options", "workers")
        plot.compare(rows, options.plot, ["throughput"], label=label, ours="czm_train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
