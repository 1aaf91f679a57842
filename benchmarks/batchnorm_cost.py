"""Count and time what BatchNorm costs a training, against CZM and others in its place.

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import collectives, counting, networks, plot, timing
from common.agreement import DisagreementError, relative_error, require
from common.networks import METHODS, NETWORKS, unavailable
from common.options import Options, parse
from common.rows import Results, Row, frame
from common.table import table
from torch import Tensor
from torch.nn import functional as F

# The deadline ends the rounds; medians of more would say no more.
_MOST_ROUNDS = 1000
_PHASES = ("forward", "backward", "optimizer")


@dataclass(kw_only=True)
class CostOptions(Options):
    """Options of the benchmark of a training."""

    model: tuple[Literal["resnet20", "resnet110", "resnet50", "vgg16", "all"], ...] = ("resnet20",)
    """The networks."""
    method: tuple[
        Literal[
            "batchnorm", "batchnorm_fused_tail", "groupnorm", "inplace_abn", "czm_plain",
            "czm_naive_noise", "czm_fused_noise", "floor", "batchnorm_compiled", "czm_compiled",
        ], ...,
    ] = ()  # fmt: skip
    """Of README.md; all that can be had by default, those under torch.compile with --compile."""
    image_size: int | None = None
    """In pixels; 32 for CIFAR's networks, 64 for torchvision's by default."""
    batch: int | None = None
    """Images a step; 128 for resnet20, 32 for resnet110, 8 for torchvision's by default."""
    autocast: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward pass; float32: no autocast."""
    channels_last: bool = False
    """Memory format of images and weights."""
    seconds: float = 60.0
    """Of timing for each model; 0: count, do not time."""
    compile: Literal["no", "inductor", "aot_eager_decomp_partition"] = "no"
    """Measure methods under torch.compile as well; the second keeps for backward what Inductor
    keeps, and compiles no kernel."""
    memory: float | None = None
    """Of a GPU, in GB: find the largest batch of each method that it holds."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "image_size")
        self.at_least(2, "batch")
        self.at_least(0, "seconds", "memory")
        if self.memory and self.device != "cuda":
            raise ValueError("--memory needs --device cuda: a CPU's memory has no limit of its own")

    @property
    def backend(self) -> str:
        """The backend of torch.compile."""
        return "inductor" if self.compile == "no" else self.compile


class Training:
    """A network, its optimizer and one batch of random images, on which every step is taken.

    Images and weights are always the same.

    Args:
        model: one of `NETWORKS`.
        method: one of `METHODS`.
        options: of the run.
        batch: images a step; the options' or the model's own by default.
    """

    def __init__(
        self, model: str, method: str, options: CostOptions, batch: int | None = None
    ) -> None:
        network = NETWORKS[model]
        self.method, self.options, self.device = method, options, options.torch_device
        batch = batch or options.batch or network.batch
        size = options.image_size or network.image_size
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.images = images.to(self.device, memory_format=layout)
        labels = torch.randint(network.classes, (batch,), generator=generator)
        self.labels = labels.to(self.device)
        built: Any = networks.build(model, method, size)
        self.model = built.to(self.device, memory_format=layout)
        self.optimizer = networks.make_optimizer(self.model, method)
        if METHODS[method].compiled:
            # Noise from torch's generator: the gradients are to be compared with eager ones.
            inductor = {"fallback_random": True} if options.backend == "inductor" else None
            self.model.compile(backend=options.backend, options=inductor, dynamic=False)
        self._timer = timing.ClockTimer(self.device)
        self.phases: list[list[float]] = []

    def autocast(self) -> Any:
        """Return the context of the forward pass."""
        dtype = getattr(torch, self.options.autocast)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def forward(self) -> Tensor:
        """Return the loss."""
        with self.autocast():
            return F.cross_entropy(self.model(self.images), self.labels)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the loss, and all gradients in one tensor, with the noise of seed 0."""
        torch.manual_seed(0)
        loss = self.forward()
        loss.backward()
        found = [parameter.grad for parameter in self.model.parameters()]
        self.optimizer.zero_grad()
        return loss.detach(), torch.cat([grad.flatten() for grad in found if grad is not None])

    def forward_backward(self) -> None:
        """Compute the gradients."""
        self.forward().backward()

    def update(self) -> None:
        """Step the optimizer, and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Take a whole step."""
        self.forward_backward()
        self.update()

    def step_in_phases(self) -> None:
        """Take a whole step, and append the microseconds of its three parts to `phases`."""
        losses: list[Tensor] = []
        calls: list[timing.Call] = [
            lambda: losses.append(self.forward()),
            lambda: losses[0].backward(),
            self.update,
        ]
        self.phases.append([self._timer(call)[0] for call in calls])

    def infer(self) -> None:
        """Run the network without a graph."""
        with torch.inference_mode(), self.autocast():
            self.model(self.images)


def check(training: Training, reference: Training) -> None:
    """Compare loss and gradients with another method's on the same images, weights and noise.

    Two forms of one computation round differently in every layer. How much that moves the gradients
    depends on the network (BatchNorm's and the ReLUs' Jacobians amplify it, in ResNet110 to
    thousands of eps), and is measured: by gradients at weights which are changed at random by up to
    half an eps, 16 times that, as every activation is rounded, not weights alone. The gradients'
    bound adds what such small changes may miss, inputs of ReLUs that round to the other side of 0:
    of N inputs about N * eps do, and each has about 1 / N of the gradients' squared norm, together
    sqrt(eps) of the norm. Under autocast it is wide: what it says of methods, float32 says better.

    Args:
        training: what is checked.
        reference: what it is checked against. Its weights are changed.

    Raises:
        DisagreementError: they differ by more.
    """
    loss, gradients = training.gradients()
    expected_loss, expected = reference.gradients()
    epsilon = torch.finfo(getattr(torch, training.options.autocast)).eps
    if epsilon < 2**-10 and training.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        epsilon = 2**-10
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * epsilon)
    rounding = 16 * relative_error(reference.gradients()[1], expected)
    for what, error, bound in (
        ("gradients", relative_error(gradients, expected), rounding + math.sqrt(epsilon)),
        ("loss", relative_error(loss, expected_loss), rounding),
    ):
        require(training.method, f"{reference.method} by another name in its {what}", error, bound)


class Measurement:
    """What is measured of one model, with all its methods on the same images.

    Args:
        results: where the rows go.
        model: one of `NETWORKS`.
        options: of the run.
    """

    def __init__(self, results: Results, model: str, options: CostOptions) -> None:
        self.results, self.model, self.options = results, model, options
        network = NETWORKS[model]
        self.config = {
            "batch": options.batch or network.batch,
            "image_size": options.image_size or network.image_size,
            "dtype": options.autocast,
            "channels_last": options.channels_last,
        }

    @cached_property
    def floor_bytes(self) -> int:
        """What the architecture makes any eager training keep for backward."""
        floor = Training(self.model, "floor", self.options)
        with floor.autocast():
            return counting.floor_bytes(floor.model, floor.images)

    def add(self, method: str, metric: str, unit: str, values: Any) -> None:
        """Append a row."""
        self.results.add(self.model, method, metric, unit, values, **self.config)

    def run(self, methods: Sequence[str]) -> None:
        """Check and count every method, then time them all together.

        Raises:
            DisagreementError: a method computes something else than it should.
        """
        trainings = []
        for method in methods:
            training = Training(self.model, method, self.options)
            same_as = METHODS[method].same_as
            if same_as:
                check(training, Training(self.model, same_as, self.options))
            self.count(training)
            # Without timing, not all networks have to be in memory together.
            if self.options.seconds > 0:
                trainings.append(training)
        if trainings:
            self.time(trainings)
        if self.options.memory:
            # Compiled methods would be compiled anew for every batch that is tried.
            for method in (each for each in methods if not METHODS[each].compiled):
                make = partial(Training, self.model, method, self.options)
                largest = largest_batch(make, int(self.options.memory * 1e9))
                self.add(method, "largest_batch", "images", largest)

    def count(self, training: Training) -> None:
        """Count what a method keeps, runs and sends."""
        method, images = training.method, training.images
        # The optimizer's state belongs to the first step.
        training.step()
        with training.autocast():
            saved = counting.saved_bytes(training.model, images)
        self.add(method, "saved_bytes", "bytes", saved)
        self.add(method, "floor_bytes", "bytes", self.floor_bytes)
        states = (each for state in training.optimizer.state.values() for each in state.values())
        kept = [*training.model.parameters(), *training.model.buffers(), *states]
        peak = counting.peak_bytes(training.step, training.device)
        peak += sum(each.nbytes for each in kept if isinstance(each, Tensor))
        self.add(method, "peak_bytes", "bytes", peak)
        # A dispatch mode would keep torch.compile from compiling; what is sent is the same.
        if METHODS[method].compiled:
            return
        number = counting.operators(training.forward_backward)
        self.add(method, "operators", "operators", number)
        training.optimizer.zero_grad()
        sent = np.array(collectives.collectives(training.model, images))
        self._add_collectives(method, *sent)
        if method == "batchnorm":
            sent += collectives.synchronised_statistics(training.model)
            self._add_collectives("sync_batchnorm", *sent)

    def _add_collectives(self, method: str, number: int, nbytes: int) -> None:
        self.add(method, "collectives", "collectives", number)
        self.add(method, "collective_bytes", "bytes", nbytes)

    def time(self, trainings: Sequence[Training]) -> None:
        """Time steps, then steps in their phases, then inference, each in interleaved rounds."""
        timer = timing.ClockTimer(trainings[0].device)

        def rounds(calls: Sequence[timing.Call], share: float) -> np.ndarray:
            seconds = share * self.options.seconds
            return timing.time_rounds(calls, timer, _MOST_ROUNDS, seconds)[0]

        steps = rounds([each.step for each in trainings], 0.5)
        rounds([each.step_in_phases for each in trainings], 0.25)
        for training in trainings:
            training.model.eval()
        inference = rounds([each.infer for each in trainings], 0.25)
        for number, training in enumerate(trainings):
            training.model.train()
            self.add(training.method, "step", "us", steps[:, number])
            phases = np.array(training.phases[timing.WARM_UP_ROUNDS :]).T
            for phase, times in zip(_PHASES, phases, strict=True):
                self.add(training.method, phase, "us", times)
            self.add(training.method, "inference", "us", inference[:, number])


def largest_batch(make: Callable[[int], Training], nbytes: int) -> int:
    """Return the most images a step for which a GPU's memory suffices, to 1 %; 0 for none.

    Args:
        make: makes a training of so many images a step.
        nbytes: what torch's allocator may reserve. Nothing else of torch's may be on the GPU.
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
    try:
        # BatchNorm needs two images; the doubling ends, as memory does.
        fits, fails = 0, 2
        while _runs(make, fails):
            fits, fails = fails, 2 * fails
        while fails - fits > max(1, fits // 100):
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if _runs(make, middle) else (fits, middle)
        return fits
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _runs(make: Callable[[int], Training], batch: int) -> bool:
    try:
        _two_steps(make, batch)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _two_steps(make: Callable[[int], Training], batch: int) -> None:
    training = make(batch)
    # The optimizer's state comes with the first step, and stays during the second.
    training.step()
    training.step()
    torch.cuda.synchronize()


def _methods(model: str, options: CostOptions) -> list[str]:
    """Return the methods to measure, and say what is left out.

    Raises:
        ImportError: one that was asked for cannot be measured here.
    """
    methods = []
    for method in dict.fromkeys(options.method or METHODS):
        if not options.method and METHODS[method].compiled and options.compile == "no":
            continue
        reason = unavailable(model, method)
        if reason is None:
            methods.append(method)
        elif options.method:
            raise ImportError(f"{model}: no {method}: {reason}")
        else:
            print(f"{model}: without {method}: {reason}")
    return methods


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw memory and time of a step, as shares of BatchNorm's."""
    panels = frame(rows)
    panels["model"] += ", batch " + panels["batch"].astype(str) + ", " + panels["dtype"]
    titles = {
        "saved_bytes": "saved for backward",
        "peak_bytes": "peak memory of a step",
        "step": "time of a step",
    }
    plot.compare(panels, path, list(titles), "batchnorm", titles=titles)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a method computes something else than it should."""
    options = parse(CostOptions, arguments, "Count and time what BatchNorm costs a training.")
    results = Results("batchnorm_cost", options.torch_device, options.json)
    print(results.machine, end="\n\n", flush=True)
    begun = time.monotonic()
    for model in NETWORKS if "all" in options.model else dict.fromkeys(options.model):
        begin = len(results.rows)
        try:
            Measurement(results, model, options).run(_methods(model, options))
        except (ImportError, DisagreementError) as error:
            print(f"{model}: {error}", file=sys.stderr)
            return 1
        # What has been compiled for one model counts against the limit of the next.
        torch.compiler.reset()
        shares = ("saved_bytes", "peak_bytes", "step")
        print(table(frame(results.rows[begin:]), baseline="batchnorm", shares=shares), "\n")
    print(f"{time.monotonic() - begun:.0f} s")
    if options.plot:
        draw(results.rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
