"""Compare BatchNorm, its alternatives and CZM on one protocol: accuracy against cost.

See README.md beside this file. A run that is stopped goes on where it was when started again with
the same `--json`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from common import counting, plot, timing
from common.agreement import DisagreementError, relative_error, require
from common.images import averaged
from common.normalisers import (
    CLASSES,
    NETWORKS,
    PROVIDERS,
    build,
    clip_gradients,
    make_optimizer,
)
from common.options import Options, parse
from common.rows import Results, frame, value
from common.table import table
from torch import Tensor, nn
from torch.nn import functional as F

from czm_fused import center_, uncenter_

_MOST_ROUNDS = 300
_TEST_BATCH = 500
# What CIFAR-10's test set has, and the protocol holds out for the choice of the rate.
HELD_OUT = 5000
BASELINE = "batchnorm"


@dataclass(kw_only=True)
class AlternativesOptions(Options):
    """Options of the comparison."""

    network: tuple[Literal["resnet20", "depthwise"], ...] = ("resnet20", "depthwise")
    """The networks."""
    provider: tuple[
        Literal[
            "batchnorm", "batchnorm_compiled", "groupnorm", "groupnorm_ws", "frn_tlu", "evonorm_s0",
            "nf_agc", "dynamic_tanh", "plain", "czmi", "czmig", "czmig_noise", "czmig_centered",
            "czmig_normalised",
        ], ...,
    ] = ()  # fmt: skip
    """What is compared; everything by default."""
    measure: tuple[Literal["counts", "times", "accuracy"], ...] = ("counts", "times", "accuracy")
    """What is measured, in this order."""
    data_dir: Path | None = None
    """Folder with train/<class>/ and test/<class>/, for the accuracy."""
    image_size: int = 16
    """Height and width of the images; larger ones of --data-dir are averaged to it."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Images a step, of counts and times."""
    seconds: float = 20.0
    """Of timing, for each network and batch."""
    steps: int = 1500
    """Of a training."""
    batch: int = 64
    """Images a step of a training."""
    seeds: int = 2
    """Trainings at the rate that was chosen."""
    held_out: int = HELD_OUT
    """Images of the training set that the rate is chosen on."""
    width: int = 16
    """Channels of the stem."""

    def check(self) -> None:
        """Check what the types do not."""
        super().check()
        self.at_least(1, "image_size", "steps", "seeds", "held_out", "width")
        self.at_least(2, "batch")
        self.at_least(0, "seconds")
        if self.width % 4:
            raise ValueError(f"--width must be a multiple of 4, but was {self.width}")
        if "accuracy" in self.measure and self.data_dir is None:
            raise ValueError("--measure accuracy needs --data-dir; or name --measure counts times")
        if self.plot and not {"times", "accuracy"} <= {*self.measure}:
            raise ValueError("--plot shows accuracy over time: --measure both, or leave it out")
        for part in ("train", "test"):
            if self.data_dir is not None and not (self.data_dir / part).is_dir():
                raise ValueError(f"--data-dir: {self.data_dir} has no folder {part}")

    @property
    def providers(self) -> list[str]:
        """The names of what is compared."""
        return list(dict.fromkeys(self.provider or PROVIDERS))


@dataclass(frozen=True)
class Images:
    """Images and labels: `(N, 3, H, W)`, normalised, and `(N,)`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """What is trained on, chosen on and tested on."""

    train: Images
    chosen_on: Images
    test: Images


def load(options: AlternativesOptions) -> Data:
    """Return the images of `--data-dir`, normalised by the mean and deviation of each channel.

    Images of more than `--image-size` pixels are averaged to it, and rounded.

    Raises:
        ValueError: there are fewer images than are held out and a batch.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    def read(part: str) -> Images:
        assert options.data_dir is not None
        folder = ImageFolder(str(options.data_dir / part), pil_to_tensor)
        pixels = torch.stack([averaged(image, options.image_size) for image, _ in folder])
        return Images(pixels, torch.tensor(folder.targets))

    train, test = read("train"), read("test")
    if len(train) < options.held_out + options.batch:
        raise ValueError(
            f"--data-dir: {len(train)} training images do not allow to hold {options.held_out} out "
            f"and train in batches of {options.batch}"
        )
    if not 0 <= int(train.labels.max()) < CLASSES:
        raise ValueError(f"--data-dir must have at most {CLASSES} classes")
    std, mean = torch.std_mean(train.pixels.float(), dim=(0, 2, 3), keepdim=True)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))

    def normalised(images: Images, indices: Tensor) -> Images:
        pixels = ((images.pixels[indices].float() - mean) / std).to(options.torch_device)
        return Images(pixels, images.labels[indices].to(options.torch_device))

    return Data(
        normalised(train, order[options.held_out :]),
        normalised(train, order[: options.held_out]),
        normalised(test, torch.arange(len(test))),
    )


def forward_backward(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Compute the gradients, and return the loss."""
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return float(loss.detach())


def take_step(
    model: nn.Module, provider: str, optimizer: torch.optim.Optimizer, batch: Images
) -> float:
    """Take one step of a training, gradients bounded as the provider does; return the loss."""
    optimizer.zero_grad()
    loss = forward_backward(model, batch.pixels, batch.labels)
    clip_gradients(model, provider)
    optimizer.step()
    return loss


def train(
    network: str, provider: str, data: Data, lr: float, seed: int, steps: int, options: Any
) -> nn.Module | None:
    """Train a network with flips and half a cosine of the rate; return None if it diverges.

    Args:
        network: one of `NETWORKS`.
        provider: one of `PROVIDERS`.
        data: what to train on.
        lr: the rate at the start.
        seed: of weights, order and flips.
        steps: of the training.
        options: of the run; `batch` and `width` are used.
    """
    images = data.train
    model = build(network, provider, images.pixels[: options.batch], seed, options.width)
    optimizer = make_optimizer(model, provider, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    center_every = PROVIDERS[provider].center_every
    for step in range(steps):
        if len(order) < options.batch:
            order = torch.randperm(len(images), generator=generator)
        indices, order = order[: options.batch], order[options.batch :]
        flips = torch.rand(options.batch, generator=generator) < 0.5
        pixels = images.pixels[indices.to(images.pixels.device)]
        flips = flips.to(pixels.device)[:, None, None, None]
        pixels = torch.where(flips, pixels.flip(3), pixels)
        labels = images.labels[indices.to(images.labels.device)]
        if center_every and step % center_every == 0:
            center_(model, pixels)
        loss = take_step(model, provider, optimizer, Images(pixels, labels))
        if not math.isfinite(loss):
            return None
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module | None, images: Images) -> float:
    """Return the share of images that are classified right, in percent; a diverged model's is 0."""
    if model is None:
        return 0.0
    model.eval()
    right = 0
    for pixels, labels in zip(
        images.pixels.split(_TEST_BATCH), images.labels.split(_TEST_BATCH), strict=True
    ):
        right += int((model(pixels).argmax(dim=1) == labels).sum())
    return 100 * right / len(images)


class Comparison:
    """All measurements of one network; those whose rows are there are not made again.

    Args:
        results: where the rows go.
        network: one of `NETWORKS`.
        options: of the run.
    """

    def __init__(self, results: Results, network: str, options: AlternativesOptions) -> None:
        self.results, self.network, self.options = results, network, options
        self.config = {"image_size": options.image_size, "width": options.width}
        # The depthwise network has no place for the noise that costs nothing.
        self.providers = [
            each for each in options.providers if network == "resnet20" or not PROVIDERS[each].noise
        ]

    def random_images(self, batch: int) -> Images:
        """Return random images, always the same."""
        generator = torch.Generator().manual_seed(0)
        size = self.options.image_size
        pixels = torch.randn(batch, 3, size, size, generator=generator)
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        device = self.options.torch_device
        return Images(pixels.to(device), labels.to(device))

    def built(self, provider: str) -> nn.Module:
        """Return the network of a provider, compiled where it is to be; check that one.

        Raises:
            DisagreementError: the compiled network computes something else.
        """
        images = self.random_images(max(self.options.batches + (16,)))
        model = build(self.network, provider, images.pixels, 0, self.options.width)
        if PROVIDERS[provider].center_every:
            center_(model, images.pixels)
        if PROVIDERS[provider].compiled:
            eager = copy.deepcopy(model)
            # The limit of compilations counts those of earlier batches and networks.
            torch.compiler.reset()
            # `model.compile` would compile each unit of an nn.Sequential on its own.
            model = torch.compile(model, dynamic=False)
            with torch.no_grad():
                error = relative_error(model(images.pixels), eager(images.pixels))
            # Each of some 20 layers rounds by a few eps.
            require(provider, "the eager network", error, 100 * torch.finfo(torch.float32).eps)
        return model

    def count(self) -> None:
        """Count bytes saved for backward and operators at inference."""
        for provider in self.providers:
            # Under torch.compile, no dispatch mode sees the operators.
            if PROVIDERS[provider].compiled:
                continue
            for batch in self.options.batches:
                config = {**self.config, "batch": batch}
                if self.results.has(self.network, provider, "inference_operators", **config):
                    continue
                images, model = self.random_images(batch), self.built(provider)
                saved = counting.saved_bytes(model, images.pixels)
                self.results.add(self.network, provider, "saved_bytes", "bytes", saved, **config)
                with torch.no_grad():
                    folded = _folded(model.eval())
                    number = counting.operators(partial(folded, images.pixels))
                self.results.add(
                    self.network, provider, "inference_operators", "operators", number, **config
                )

    def time(self) -> None:
        """Time a training step and the inference of every provider, in interleaved rounds."""
        timer = timing.ClockTimer(self.options.torch_device)
        for batch in self.options.batches:
            config = {**self.config, "batch": batch}
            missing = [
                provider
                for provider in self.providers
                if not self.results.has(self.network, provider, "inference", **config)
            ]
            if not missing:
                continue
            images = self.random_images(batch)
            models = {provider: self.built(provider) for provider in missing}
            steps, centerings, inferences = [], {}, []
            for index, (provider, model) in enumerate(models.items()):
                # A rate that leaves the weights where they are.
                optimizer = make_optimizer(model, provider, 1e-6)
                steps.append(partial(take_step, model, provider, optimizer, images))
                inferences.append(torch.no_grad()(partial(model, images.pixels)))
                if PROVIDERS[provider].center_every:
                    centerings[index] = partial(center_, model, images.pixels)
            seconds = self.options.seconds / 2
            calls = [*steps, *centerings.values()]
            done, _ = timing.time_rounds(calls, timer, _MOST_ROUNDS, seconds)
            # Each step bears its share of measuring the means.
            for column, index in enumerate(centerings, start=len(steps)):
                done[:, index] += done[:, column] / PROVIDERS[missing[index]].center_every
            for model in models.values():
                # As it is deployed.
                uncenter_(model.eval())
            inferred, _ = timing.time_rounds(inferences, timer, _MOST_ROUNDS, seconds)
            for index, provider in enumerate(missing):
                for metric, times in (("step", done), ("inference", inferred)):
                    self.results.add(
                        self.network, provider, metric, "us", times[:, index], **config
                    )

    def learn(self, data: Data) -> None:
        """Train every provider at equal steps and, where times are known, at equal time.

        Both at the best of its three rates on the images held out, after `--steps` steps.
        """
        for provider in self.providers:
            # Compiled, BatchNorm learns the same.
            if PROVIDERS[provider].compiled:
                continue
            held_out = {
                lr: self._run(provider, data, lr, 0, self.options.steps, "held_out")
                for lr in PROVIDERS[provider].rates
            }
            best = max(held_out, key=lambda lr: held_out[lr])
            budgets = {"steps": self.options.steps}
            share = self._step_share(provider)
            if share is not None:
                budgets["time"] = max(1, round(self.options.steps / share))
            for budget, steps in budgets.items():
                config = {**self._training(), "steps": steps, "lr": best}
                metric = f"accuracy_at_equal_{budget}"
                found = [
                    self._run(provider, data, best, seed, steps, "test")
                    for seed in range(self.options.seeds)
                ]
                if not self.results.has(self.network, provider, metric, **config):
                    self.results.add(self.network, provider, metric, "%", found, **config)

    def _training(self) -> dict[str, Any]:
        options = self.options
        return {"width": options.width, "batch": options.batch, "held_out_images": options.held_out}

    def _run(self, provider: str, data: Data, lr: float, seed: int, steps: int, part: str) -> float:
        """Return the accuracy of one training on a part of the data, from its row if it is there.

        A diverged training's is 0.
        """
        config = {**self._training(), "steps": steps, "lr": lr, "seed": seed}
        if not self.results.has(self.network, provider, f"{part}_accuracy", **config):
            model = train(self.network, provider, data, lr, seed, steps, self.options)
            # Both at once: the training is what takes the time.
            for name, images in (("test", data.test), ("held_out", data.chosen_on)):
                percent = accuracy(model, images)
                metric = f"{name}_accuracy"
                if not self.results.has(self.network, provider, metric, **config):
                    self.results.add(self.network, provider, metric, "%", percent, **config)
            print(f"{self.network} {provider}, lr {lr}, seed {seed}, {steps} steps", flush=True)
        config |= {"model": self.network, "provider": provider, "metric": f"{part}_accuracy"}
        return value(self.results.rows, **config)

    def _step_share(self, provider: str) -> float | None:
        """Return a step's time as a share of BatchNorm's, at the largest batch; None if unknown."""
        wanted = {
            **self.config, "batch": max(self.options.batches), "model": self.network,
            "metric": "step",
        }  # fmt: skip
        try:
            times = [value(self.results.rows, provider=p, **wanted) for p in (provider, BASELINE)]
        except LookupError:
            return None
        return times[0] / times[1]


def _folded(model: nn.Module) -> nn.Module:
    """Return a model as it is deployed: BatchNorm and means folded into the convolutions."""
    from torch.fx.experimental.optimization import fuse

    uncenter_(model)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    folded: nn.Module = fuse(model)
    return folded


_SHOWN = (
    "saved_bytes", "inference_operators", "step", "inference",
    "accuracy_at_equal_steps", "accuracy_at_equal_time",
)  # fmt: skip


def summary(results: Results, options: AlternativesOptions) -> Any:
    """Return the rows that table and picture show, as a frame: costs at the largest batch alone."""
    rows = frame(results.rows)
    rows = rows[rows["metric"].isin(_SHOWN)]
    of_cost = ~rows["metric"].str.startswith("accuracy")
    return rows[~of_cost | (rows["batch"] == max(options.batches))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a compiled network computes something else."""
    options = parse(AlternativesOptions, arguments, "Compare BatchNorm, its alternatives and CZM.")
    device = options.torch_device
    try:
        results = Results("alternatives", device, options.json, resume=True)
        data = load(options) if "accuracy" in options.measure else None
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(results.machine, flush=True)
    for network in (each for each in NETWORKS if each in options.network):
        comparison = Comparison(results, network, options)
        try:
            if "counts" in options.measure:
                comparison.count()
            if "times" in options.measure:
                comparison.time()
        except DisagreementError as error:
            print(f"{network}: {error}", file=sys.stderr)
            return 1
        if data is not None:
            comparison.learn(data)
    shown = summary(results, options)
    print(table(shown, baseline=BASELINE, shares=("saved_bytes", "step")))
    if options.plot:
        titles = {
            "step": f"time of a training step, batch {max(options.batches)}",
            "accuracy_at_equal_steps": "test accuracy at equal steps",
        }
        plot.tradeoff(shown, options.plot, "step", "accuracy_at_equal_steps", titles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
