"""The training itself: epochs of steps, tests, and the state to go on from."""

# torch is typed in part.
# mypy: allow-untyped-calls, disable-error-code="import-untyped"

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..centering import center_, uncenter_
from ..diagnostics import diagnose
from .batches import TEST_BATCH_SIZE, DeviceBatches, LoaderBatches
from .captured import CapturedStep
from .config import Config
from .data import DataSet
from .distributed import Ranks
from .errors import DivergedError, TrainingError, explained
from .methods import build_model, build_optimizer

SECONDS_BETWEEN_LOOKS = 0.5
REJECTION_IMAGES = 128
_MOST_DB = 200.0  # the precision of float32 hides what is left of a shift


class Trainer:
    """A network, its optimizer and schedule, and the state of every random generator.

    Two trainers with the same config and data, or one that loaded the other's state, train the
    same weights, bit for bit on a CPU. Batches are drawn from a generator of its own, the noise
    from torch's default generators, which it seeds.

    Args:
        config: options of the run.
        data: a `DataSet` on `device`, a DataLoader, or a pair of them for training and test.
        device: where to train.
        ranks: processes that share every batch; each has a trainer like this one.
        model: the user's network; None builds the config's residual network for a `DataSet`.

    Raises:
        ValueError: the model or the optimizer refuses an option.
    """

    def __init__(
        self,
        config: Config,
        data: Any,
        device: torch.device,
        ranks: Ranks | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        self.epoch = 0
        self._steps = 0  # of the epoch
        torch.manual_seed(config.seed)
        if model is None:
            channels = data.train.pixels.shape[1]
            model = build_model(config, in_channels=channels, num_classes=data.num_classes)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.batches: DeviceBatches | LoaderBatches
        if isinstance(data, DataSet):
            self.batches = DeviceBatches(data, config, self.generator)
        else:
            self.batches = LoaderBatches(data, device)
        self.memory_format = torch.contiguous_format
        if config.channels_last:
            self.memory_format = torch.channels_last
        with explained("--channels-last does not fit this network", "leave it out"):
            self.model = model.to(  # type: ignore[call-overload]
                device, memory_format=self.memory_format
            )
        self.optimizer = build_optimizer(config, self.model)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # A graph reads the rates anew at each replay, from where they were at its capture.
        self._rate_tensors = [torch.tensor(rate, device=device) for rate in self._rates]
        self._network = self.ranks.wrap(self.model, device)
        self._compiled = torch.compile(self._network, dynamic=False) if config.compile else None
        # A graph cannot be captured on the default stream.
        captures = config.cuda_graph and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if captures else None
        if self.ranks.rank > 0:
            # Rank 0 goes on where the network was initialised, as a single process does.
            torch.manual_seed(config.seed + self.ranks.rank)
        self._make_steps()

    @property
    def lr(self) -> float:
        """The filters' learning rate of the coming epoch."""
        return self._rates[0] * self._rate_factor()

    def train_epoch(self) -> tuple[float, float, int]:
        """Train on every training image once; return mean loss, accuracy in percent and images.

        Raises DivergedError, which names the epoch and the step, where the loss is not finite.
        """
        self.model.train()
        self._steps = 0
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        with self._context():
            groups = self.optimizer.param_groups
            for group, rate, tensor in zip(groups, self._rates, self._rate_tensors, strict=True):
                rate *= self._rate_factor()
                group["lr"] = tensor.fill_(rate) if self.config.cuda_graph else rate
            result = self._pass(self.batches.training(), self._train, title)
        if self.config.center_every:
            # The state of the network is a plain one's between two epochs.
            uncenter_(self.model)
        self.epoch += 1
        return result

    def test(self) -> tuple[float, float, int]:
        """Return the mean loss, the accuracy in percent and the number of the test images."""
        self.model.eval()
        with self._context():
            return self._pass(self.batches.testing(), self._test, f"test after epoch {self.epoch}")

    def rejection(self) -> dict[str, float | None]:
        """Return the common-mode rejection of every convolution on some images, dB, in their order.

        None stands for a layer that passes nothing. Changes nothing, and draws no random numbers.
        """
        images = self._lay_out(self.batches.sample(REJECTION_IMAGES))
        report = diagnose(self.model, images, self.optimizer)
        ratios = {layer.name: layer.rejection_db for layer in report.layers}
        return {
            name: None if db is None or math.isnan(db) else max(-_MOST_DB, min(db, _MOST_DB))
            for name, db in ratios.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that determines the coming epochs."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "device_type": self.device.type,
            "generators": {
                "default": self.ranks.gather([each.get_rng_state() for each in self._default()]),
                "data": self.generator.get_state(),
                "loaders": [each.get_state() for each in self.batches.generators],
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another trainer's `state_dict` was taken, or raise TrainingError."""
        kind = state["device_type"]
        if kind != self.device.type:
            raise TrainingError(
                f"the checkpoint was trained on {kind}, not {self.device.type}: "
                f"resume it with --device {kind}"
            )
        with explained("the checkpoint is damaged or of another network"):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            # Ranks that the checkpoint does not know keep their own seeds.
            for saved in state["generators"]["default"][self.ranks.rank :][:1]:
                for generator, value in zip(self._default(), saved, strict=True):
                    generator.set_rng_state(value)
            self.generator.set_state(state["generators"]["data"])
            loaders = state["generators"].get("loaders", ())
            for generator, value in zip(self.batches.generators, loaders, strict=False):
                generator.set_state(value)
            self.epoch = int(state["epoch"])
        # A captured graph would go on with the state that was replaced.
        self._make_steps()

    def _rate_factor(self) -> float:
        if self.config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * self.epoch / self.config.epochs))
        return 0.1 ** sum(epoch <= self.epoch for epoch in self.config.rate_drops)

    def _default(self) -> list[Any]:
        """Return the modules that hold torch's default generators, which the noise draws from."""
        of_device = torch.get_device_module(self.device)
        return [torch] if self.device.type == "cpu" else [torch, of_device]

    def _make_steps(self) -> None:
        def train(batch: Any) -> Tensor:
            return self._train_step(*self.batches.load_training(batch))

        @torch.no_grad()
        def test(batch: Any) -> Tensor:
            return self._forward(self.model, *self.batches.load_testing(batch))[1]

        self._train: Callable[[Any], Tensor] = train
        self._test: Callable[[Any], Tensor] = test
        if self.config.cuda_graph:
            self._train = CapturedStep(train, self.config.batch_size, [self.generator])
            self._test = CapturedStep(test, TEST_BATCH_SIZE)

    def _train_step(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Take a step; return the sum of the losses, the right answers and the images."""
        is_full = len(labels) == (self.batches.batch_size or len(labels))
        network = self._compiled if self._compiled is not None and is_full else self._network
        every = self.config.center_every
        # Every process has images then.
        if every and self._steps % every == 0 and len(labels) >= self.ranks.size:
            share = self.ranks.share(len(labels))
            with explained("--center-every"):
                center_(self.model, self._lay_out(self.batches.normalise(pixels[share])))
        self._steps += 1
        loss, sums = self._forward(network, pixels, labels)
        self.optimizer.zero_grad()
        # The gradients of the processes are averaged, the losses are parts of a sum.
        (self.ranks.size * loss / len(labels)).backward()
        self.optimizer.step()
        return sums

    def _forward(
        self, network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of this process's images, alone and with their counts."""
        share = self.ranks.share(len(labels))
        images, labels = self._lay_out(self.batches.normalise(pixels[share])), labels[share]
        autocasts = self.config.autocast != "off"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts):
            outputs = network(images)
            if outputs.dim() != 2 or labels.dim() != 1:
                raise TrainingError(
                    "the network must return logits (images, classes) for labels (images,), but "
                    f"returned {tuple(outputs.shape)} for {tuple(labels.shape)}"
                )
            loss = F.cross_entropy(outputs, labels, reduction="sum")
        hits = (outputs.detach().argmax(dim=1) == labels).sum()
        count = torch.full_like(hits, len(labels))
        return loss, torch.stack([loss.detach().double(), hits.double(), count.double()])

    def _lay_out(self, images: Tensor) -> Tensor:
        # The layouts differ for images alone, not for signals.
        four = images.dim() == 4
        return images.contiguous(memory_format=self.memory_format) if four else images

    def _pass(
        self, batches: Iterable[Any], step: Callable[[Any], Tensor], title: str
    ) -> tuple[float, float, int]:
        results: list[Tensor] = []  # on the device until they are read
        next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        hidden = None if self.ranks.rank == 0 else True
        style = {"unit": "step", "disable": hidden, "leave": False, "dynamic_ncols": True}
        with tqdm(batches, title, **style) as bar:
            for batch in bar:
                results.append(step(batch))
                if self.ranks.size == 1 and time.monotonic() >= next_look:
                    loss, accuracy, _ = self._read(results, title)
                    bar.set_postfix_str(f"loss {loss:.3f}, {accuracy:.1f} %")
                    next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        return self._read(results, title)

    def _read(self, results: list[Tensor], title: str) -> tuple[float, float, int]:
        if not results:
            raise TrainingError(f"{title}: the DataLoader gave no batch")
        sums = self.ranks.sum_(torch.stack(results)).cpu()
        for step, loss in enumerate(sums[:, 0].tolist(), start=1):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss became {loss} in {title}, step {step}, seed {self.config.seed}"
                )
        loss, hits, images = sums.sum(0).tolist()
        return loss / images, 100 * hits / images, int(images)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Compute at the config's precision, and on the stream that graphs are captured on."""
        on_gpu = self.device.type == "cuda"
        precision = float32_products(self.config.tf32) if on_gpu else nullcontext()
        with precision, torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.default_stream(self.device))
            yield
        if self._stream is not None:
            torch.cuda.default_stream(self.device).wait_stream(self._stream)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Let GPUs round the factors of float32 products to TF32's 10 bits, or insist on float32.

    torch itself leaves convolutions in TF32 and matrix products not.
    """
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, torch.get_float32_matmul_precision()
    convolutions.fp32_precision = "tf32" if tf32 else "ieee"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        convolutions.fp32_precision = before[0]
        torch.set_float32_matmul_precision(before[1])
