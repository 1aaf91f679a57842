"""The training itself: epochs of steps, tests, and the state to go on from."""

# torch is typed in part.
# mypy: allow-untyped-calls, disable-error-code="import-untyped"

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diagnostics import diagnose
from .batches import TEST_BATCH_SIZE, DeviceBatches, LoaderBatches
from .captured import CapturedStep
from .config import ResolvedConfig
from .data import DataSet
from .distributed import Ranks
from .errors import DivergedError, TrainingError
from .methods import build_model, build_optimizer
from .precision import float32_products

SECONDS_BETWEEN_LOOKS = 0.5
REJECTION_IMAGES = 128
_MOST_DB = 200.0  # the precision of float32 hides what is left of a shift


class Trainer:
    """A network, its optimizer and schedule, and the state of every random generator.

    Two trainers with the same config and data, or one that loaded the other's state, train the
    same weights, bit for bit on a CPU. The noise is drawn from torch's default generators.

    Args:
        config: options of the run.
        batches: source of the batches, on `device`.
        model: network to train, on `device`.
        generator: the one that `batches` draw from.
        ranks: processes that share every batch; each has a trainer like this one.

    Raises:
        ValueError: the model or the optimizer refuses an option.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        batches: DeviceBatches | LoaderBatches,
        model: nn.Module,
        generator: torch.Generator,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.batches = batches
        self.generator = generator
        self.device = generator.device
        self.ranks = ranks or Ranks()
        self.epoch = 0
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.model = model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(config, self.model)
        if config.cuda_graph:
            _keep_rates_on(self.device, self.optimizer)
        schedules = torch.optim.lr_scheduler
        self.scheduler = (
            schedules.CosineAnnealingLR(self.optimizer, config.epochs)
            if config.schedule == "cosine"
            else schedules.MultiStepLR(self.optimizer, config.milestones, gamma=0.1)
        )
        self._network = self.ranks.wrap(self.model, self.device)
        self._compiled = torch.compile(self._network, dynamic=False) if config.compile else None
        # A graph cannot be captured on the default stream.
        captures = config.cuda_graph and self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if captures else None
        if self.ranks.rank > 0:
            # Rank 0 goes on where the network was initialised, as a single process does.
            torch.manual_seed(config.seed + self.ranks.rank)
        self._make_steps()

    @property
    def lr(self) -> float:
        """The filters' learning rate of the coming epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def has_test(self) -> bool:
        """True if there are test images."""
        return self.batches.has_test

    def train_epoch(
        self, between_steps: Callable[[], None] = lambda: None
    ) -> tuple[float, float, int]:
        """Train on every training image once; return mean loss, accuracy in percent and images.

        Args:
            between_steps: called before each step; an exception that it raises ends the epoch.

        Raises:
            DivergedError: the loss is not finite; the message names the epoch and the step.
        """
        self.model.train()
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        with self._context():
            result = self._pass(self.batches.training(), self._train, title, between_steps)
            self.scheduler.step()
        self.epoch += 1
        return result

    def test(self, between_steps: Callable[[], None] = lambda: None) -> tuple[float, float, int]:
        """Return the mean loss, the accuracy in percent and the number of the test images.

        Args:
            between_steps: called before each batch; an exception that it raises ends the test.

        Raises:
            DivergedError: the loss is not finite.
        """
        self.model.eval()
        title = f"test after epoch {self.epoch}"
        with self._context():
            return self._pass(self.batches.testing(), self._test, title, between_steps)

    def rejection(self) -> dict[str, float | None]:
        """Return the common-mode rejection of every convolution on some images, dB, in their order.

        None stands for a layer that passes nothing. Changes nothing, and draws no random numbers.
        """
        images = self.batches.sample(REJECTION_IMAGES)
        if images is None:
            return {}
        images = images.contiguous(memory_format=self.memory_format)
        found: dict[str, float | None] = {}
        for layer in diagnose(self.model, images, self.optimizer).layers:
            ratio = layer.rejection_db
            if ratio is None or math.isnan(ratio):
                found[layer.name] = None
            else:
                found[layer.name] = round(max(-_MOST_DB, min(ratio, _MOST_DB)), 3)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state that determines the coming epochs."""
        on_device = () if self.device.type == "cpu" else (self._device_generator().get_rng_state(),)
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": _with_numbers(self.optimizer.state_dict()),
            "scheduler": _numbers(self.scheduler.state_dict()),
            "device_type": self.device.type,
            "generators": {
                "default": self.ranks.gather((torch.get_rng_state(), *on_device)),
                "data": self.generator.get_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another trainer's `state_dict` was taken.

        Raises:
            TrainingError: the state is damaged, of another network or of another kind of device.
        """
        kind = state.get("device_type")
        if kind in ("cpu", "cuda", "xpu") and kind != self.device.type:
            raise TrainingError(
                f"the checkpoint was trained on {kind}, not {self.device.type}: "
                f"resume it with --device {kind}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.config.cuda_graph:
                _keep_rates_on(self.device, self.optimizer)
            # Ranks that the checkpoint does not know keep their own seeds.
            default = dict(enumerate(state["generators"]["default"])).get(self.ranks.rank)
            if default is not None:
                torch.set_rng_state(default[0])
                if self.device.type != "cpu":
                    self._device_generator().set_rng_state(default[1])
            self.generator.set_state(state["generators"]["data"])
            self.epoch = int(state["epoch"])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise TrainingError(
                f"the checkpoint is damaged or of another network: {reason}"
            ) from error
        # A captured graph would go on with the state that was replaced.
        self._make_steps()

    def _device_generator(self) -> Any:
        return torch.get_device_module(self.device)

    def _make_steps(self) -> None:
        def train(batch: Any) -> tuple[Tensor, ...]:
            return self._train_step(*self.batches.load_training(batch))

        @torch.no_grad()
        def test(batch: Any) -> tuple[Tensor, ...]:
            return self._test_step(*self.batches.load_testing(batch))

        self._train: Callable[[Any], tuple[Tensor, ...]] = train
        self._test: Callable[[Any], tuple[Tensor, ...]] = test
        if self.config.cuda_graph:
            self._train = CapturedStep(train, self.config.batch_size, [self.generator])
            self._test = CapturedStep(test, TEST_BATCH_SIZE)

    def _train_step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step; return the loss and the right answers of this process's images."""
        whole = len(labels)
        share = self.ranks.share(whole)
        is_full = whole == self.config.batch_size
        network = self._compiled if self._compiled is not None and is_full else self._network
        loss, hits = self._forward(network, pixels[share], labels[share], whole)
        self.optimizer.zero_grad()
        # The gradients of the processes are averaged, the losses are parts of a sum.
        (self.ranks.size * loss).backward()
        self.optimizer.step()
        return loss.detach(), hits

    def _test_step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = self.ranks.share(len(labels))
        return self._forward(self.model, pixels[share], labels[share], len(labels))

    def _forward(
        self, network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, whole: int
    ) -> tuple[Tensor, Tensor]:
        images = self.batches.normalise(pixels)
        if images.dim() == 4:
            images = images.contiguous(memory_format=self.memory_format)
        autocasts = self.config.autocast != "off"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts):
            outputs = network(images)
            loss = F.cross_entropy(outputs, labels, reduction="sum") / whole
        return loss, (outputs.detach().argmax(dim=1) == labels).sum()

    def _pass(
        self,
        batches: Iterable[Any],
        step: Callable[[Any], tuple[Tensor, ...]],
        title: str,
        between_steps: Callable[[], None],
    ) -> tuple[float, float, int]:
        from tqdm import tqdm

        results: list[tuple[Tensor, ...]] = []  # on the device until they are read
        sizes: list[int] = []
        next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        total = len(batches) if isinstance(batches, Sized) else None
        hidden = None if self.ranks.rank == 0 else True
        style = {"unit": "step", "disable": hidden, "leave": False, "dynamic_ncols": True}
        with tqdm(batches, title, total=total, **style) as bar:
            for batch in bar:
                between_steps()
                results.append(step(batch))
                sizes.append(self.batches.size_of(batch))
                if self.ranks.size == 1 and time.monotonic() >= next_look:
                    loss, accuracy, _ = self._read(results, sizes, title)
                    bar.set_postfix_str(f"loss {loss:.3f}, {accuracy:.1f} %")
                    next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        return self._read(results, sizes, title)

    def _read(
        self, results: list[tuple[Tensor, ...]], sizes: list[int], title: str
    ) -> tuple[float, float, int]:
        if not results:
            raise TrainingError(f"{title}: the DataLoader gave no batch")
        found = torch.stack([torch.stack(each).double() for each in zip(*results, strict=True)])
        losses, hits = self.ranks.sum_(found).cpu()
        for step, loss in enumerate(losses.tolist(), start=1):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss became {loss} in {title}, step {step}, seed {self.config.seed}"
                )
        images = sum(sizes)
        weights = torch.tensor(sizes, dtype=torch.float64) / images
        return float(weights @ losses), 100 * float(hits.sum()) / images, images

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Compute at the config's precision, and on the stream that graphs are captured on."""
        precision = (
            float32_products(self.config.tf32) if self.device.type == "cuda" else nullcontext()
        )
        with precision, torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.default_stream(self.device))
            yield
        if self._stream is not None:
            torch.cuda.default_stream(self.device).wait_stream(self._stream)


def reference_trainer(
    config: ResolvedConfig, data: DataSet, device: torch.device, ranks: Ranks | None = None
) -> Trainer:
    """Return the trainer of the config's residual network on `data`, which is on `device`.

    Seeds torch's default generators.

    Raises:
        ValueError: the model or the optimizer refuses an option.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, in_channels=data.channels, num_classes=data.num_classes)
    generator = torch.Generator(device).manual_seed(config.seed)
    batches = DeviceBatches(data, config, generator)
    return Trainer(config, batches, model.to(device), generator, ranks)


def rejection_is_due(epoch: int, epochs: int, times: int = 20) -> bool:
    """Return whether rejection is measured after `epoch`: about `times` times in a run."""
    return epoch % max(1, epochs // times) == 0 or epoch == epochs


def _keep_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Put the learning rates into tensors, which a graph reads anew at each replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


def _with_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with numbers for rates, also where a graph reads tensors."""
    return {**state, "param_groups": [_numbers(group) for group in state["param_groups"]]}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(each) for each in value]
        return float(value) if isinstance(value, Tensor) else value

    return {name: number(value) for name, value in values.items()}
