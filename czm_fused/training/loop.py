"""The training itself: epochs of steps on batches that are drawn and augmented on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .augment import Augmentation, Normalisation
from .captured import CapturedStep, Step
from .chance import draws_from
from .data import DataSet
from .distributed import Ranks
from .errors import DivergedError, TrainingError
from .methods import build_model, build_optimizer
from .precision import float32_products
from .settings import Settings

TEST_BATCH_SIZE = 512
SECONDS_BETWEEN_LOOKS = 0.5


def _nothing() -> None:
    pass


class Trainer:
    """A network, its optimizer and schedule, and every source of chance, seeded.

    Two trainers with the same settings and data, or one that loaded the other's state, train the
    same weights, bit for bit on a CPU, whatever else is trained in the process meanwhile.

    Args:
        settings: of the run.
        data: on `device`.
        device: where everything runs, on a CUDA device in a stream of its own.
        ranks: the processes that share every batch; each has a trainer like this one.

    Raises:
        ValueError: the model or the optimizer refuses a setting.
    """

    def __init__(
        self, settings: Settings, data: DataSet, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.settings = settings
        self.data = data
        self.device = device
        self.ranks = ranks or Ranks()
        self.epoch = 0
        chance = torch.Generator().manual_seed(settings.seed)
        with draws_from(chance):
            self.model = build_model(
                settings, in_channels=data.channels, num_classes=data.num_classes
            ).to(device)
        # The noise is drawn where the network is.
        self.chance = chance if device.type == "cpu" else _generator(device, settings.seed)
        self.generator = _generator(device, settings.seed)
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(settings, self.model)
        if settings.cuda_graph:
            _keep_rates_on(device, self.optimizer)
        self.scheduler = _schedule(settings, self.optimizer)
        self.normalise = Normalisation(data.train.pixels)
        self.augment = Augmentation(settings.crop_padding, settings.flip, self.generator)
        self._network = self.ranks.wrap(self.model, device)
        self._compiled = torch.compile(self._network, dynamic=False) if settings.compile else None
        self._name = f"seed {settings.seed}"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._make_steps()

    @property
    def lr(self) -> float:
        """The filters' learning rate of the coming epoch."""
        with self._own():
            return float(self.optimizer.param_groups[0]["lr"])

    def train_epoch(self, between_steps: Callable[[], None] = _nothing) -> tuple[float, float]:
        """Train on every training image once; return the mean loss and the accuracy in percent.

        Args:
            between_steps: called before each step; what it raises ends the epoch there.

        Raises:
            DivergedError: the loss is not finite; the message names the epoch and the step.
        """
        return train_epoch([self], between_steps)[0]

    def test(self, between_steps: Callable[[], None] = _nothing) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent on the test images.

        Args:
            between_steps: called before each batch; what it raises ends the test there.

        Raises:
            DivergedError: the loss is not finite.
        """
        return test([self], between_steps)[0]

    def training_pass(self) -> Pass:
        """Return the coming epoch, not begun; `end_epoch` comes after it."""
        self.model.train()
        with self._own():
            order = torch.randperm(
                len(self.data.train), generator=self.generator, device=self.device
            )
        batches = split(order, self.settings.batch_size, self.settings.last_batch)
        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        return Pass(self._name, title, batches, self._train, self._own, self.ranks)

    def end_epoch(self) -> None:
        """Go on to the next epoch's learning rate."""
        with self._own():
            self.scheduler.step()
        self.epoch += 1

    def testing_pass(self) -> Pass:
        """Return a pass over the test images, not begun."""
        self.model.eval()
        with self._own():
            batches = torch.arange(len(self.data.test), device=self.device).split(TEST_BATCH_SIZE)
        title = f"test after epoch {self.epoch}"
        return Pass(self._name, title, batches, self._test, self._own, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return all that determines the coming epochs."""
        with self._own():
            return {
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                "optimizer": _with_numbers(self.optimizer.state_dict()),
                "scheduler": _numbers(self.scheduler.state_dict()),
                "device_type": self.device.type,
                "generators": {
                    "default": self.chance.get_state(),
                    "data": self.generator.get_state(),
                },
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another trainer's `state_dict` was taken.

        Raises:
            TrainingError: the state is of another network or of another kind of device.
        """
        if state["device_type"] != self.device.type:
            raise TrainingError(
                f"the checkpoint was trained on {state['device_type']}, not {self.device.type}: "
                f"resume it with --device {state['device_type']}"
            )
        with self._own():
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise TrainingError(f"the checkpoint is of another network: {reason}") from error
            if self.settings.cuda_graph:
                _keep_rates_on(self.device, self.optimizer)
        self.chance.set_state(state["generators"]["default"])
        self.generator.set_state(state["generators"]["data"])
        self.epoch = state["epoch"]
        # A graph would go on with the state that was replaced.
        self._make_steps()

    def _make_steps(self) -> None:
        images = self.data

        def train(indices: Tensor) -> tuple[Tensor, Tensor]:
            return self._train_step(images.train.pixels[indices], images.train.labels[indices])

        @torch.no_grad()
        def test(indices: Tensor) -> tuple[Tensor, Tensor]:
            return self._test_step(images.test.pixels[indices], images.test.labels[indices])

        self._train: Step = train
        self._test: Step = test
        if self.settings.cuda_graph:
            self._train = CapturedStep(train, self.settings.batch_size, [self.generator])
            self._test = CapturedStep(test, TEST_BATCH_SIZE)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _train_step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step; return the loss and the right answers, of this process's images."""
        whole = len(labels)
        full = whole == self.settings.batch_size
        network = self._compiled if self._compiled is not None and full else self._network
        share = self.ranks.share(whole)
        with self.ranks.draws_for(whole):
            loss, hits = self._forward(network, self.augment(pixels)[share], labels[share], whole)
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
        images = self.normalise(pixels).contiguous(memory_format=self.memory_format)
        autocasts = self.settings.autocast != "off"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts):
            outputs = network(images)
            loss = F.cross_entropy(outputs, labels, reduction="sum") / whole
        return loss, (outputs.detach().argmax(dim=1) == labels).sum()

    @contextmanager
    def _own(self) -> Iterator[None]:
        """Draw from this trainer's generators, in its stream and at its precision."""
        with ExitStack() as stack:
            stack.enter_context(draws_from(self.chance))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
                stack.enter_context(float32_products(self.settings.tf32))
            yield


class Pass:
    """One pass over images, a step at a time.

    Args:
        name: of the training, for messages.
        title: of the pass, for messages.
        batches: the indices of their images.
        step: run on each; returns the loss and the right answers of this process's share.
        own: the context in which everything runs.
        ranks: the processes that share every batch.
    """

    def __init__(
        self,
        name: str,
        title: str,
        batches: Sequence[Tensor],
        step: Step,
        own: Callable[[], Any],
        ranks: Ranks,
    ) -> None:
        self.name = name
        self.title = title
        self._sizes = [len(batch) for batch in batches]
        self._batches = iter(batches)
        self._step = step
        self._own = own
        self._ranks = ranks
        # Left on the device until they are read.
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def images(self) -> int:
        """How many images there are in all batches."""
        return sum(self._sizes)

    @property
    def may_be_read_alone(self) -> bool:
        """Whether no other process must read at the same time."""
        return self._ranks.size == 1

    def advance(self) -> int:
        """Run the next step, not waiting for the device; return how many images it took."""
        with self._own():
            loss, hits = self._step(next(self._batches))
        self._losses.append(loss)
        self._hits.append(hits)
        return self._sizes[len(self._losses) - 1]

    def read(self) -> tuple[float, float]:
        """Wait for the device; return the mean loss and the accuracy in percent so far.

        Raises:
            DivergedError: a loss is not finite.
        """
        with self._own():
            found = torch.stack([torch.stack(each).double() for each in (self._losses, self._hits)])
            losses, hits = self._ranks.sum_(found).cpu()
        for step, loss in enumerate(losses.tolist(), start=1):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss became {loss} in {self.title}, step {step}, {self.name}"
                )
        sizes = self._sizes[: len(losses)]
        weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        return float(weights @ losses), 100 * float(hits.sum()) / sum(sizes)


def train_epoch(
    trainers: Sequence[Trainer], between_steps: Callable[[], None] = _nothing
) -> list[tuple[float, float]]:
    """Train each trainer an epoch, a step of each in turn; return what `Trainer.train_epoch` does.

    Args:
        trainers: with the same number of steps an epoch.
        between_steps: called before each round of steps; what it raises ends the epoch there.

    Raises:
        DivergedError: a loss is not finite.
    """
    results = _take_turns([trainer.training_pass() for trainer in trainers], between_steps)
    for trainer in trainers:
        trainer.end_epoch()
    return results


def test(
    trainers: Sequence[Trainer], between_steps: Callable[[], None] = _nothing
) -> list[tuple[float, float]]:
    """Test each trainer, a batch of each in turn; return what `Trainer.test` does.

    Args:
        trainers: with the same number of test images.
        between_steps: called before each round of batches; what it raises ends the test there.

    Raises:
        DivergedError: a loss is not finite.
    """
    return _take_turns([trainer.testing_pass() for trainer in trainers], between_steps)


def split(order: Tensor, size: int, last_batch: str) -> list[Tensor]:
    """Split the images of an epoch into batches.

    Args:
        order: the images' indices, `(images,)`.
        size: images a batch.
        last_batch: what becomes of the remainder: `"keep"` makes it a batch of its own, `"join"`
            adds it to the batch before if it is less than half a batch.
    """
    batches = list(order.split(size))
    if last_batch == "join" and len(batches) > 1 and 2 * len(batches[-1]) < size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _take_turns(
    passes: Sequence[Pass], between_steps: Callable[[], None]
) -> list[tuple[float, float]]:
    from tqdm import tqdm

    first = passes[0]
    next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
    images = sum(each.images for each in passes)
    with tqdm(total=images, desc=first.title, unit=" images", disable=None, leave=False) as bar:
        for _ in range(len(first)):
            between_steps()
            for each in passes:
                bar.update(each.advance())
            if first.may_be_read_alone and time.monotonic() >= next_look:
                loss, accuracy = first.read()
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %")
                next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
    return [each.read() for each in passes]


def _schedule(
    settings: Settings, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    schedules = torch.optim.lr_scheduler
    if settings.schedule == "cosine":
        return schedules.CosineAnnealingLR(optimizer, settings.epochs)
    return schedules.MultiStepLR(optimizer, settings.milestones, gamma=0.1)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _keep_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Put the learning rates where a graph reads them anew at each replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


def _with_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with numbers for rates, whether or not a graph reads them."""
    return {**state, "param_groups": [_numbers(group) for group in state["param_groups"]]}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(each) for each in value]
        return float(value) if isinstance(value, Tensor) else value

    return {name: number(value) for name, value in values.items()}
