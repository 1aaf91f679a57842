"""The training itself: epochs of steps on batches that are drawn and augmented on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .augment import Augmentation, Normalisation
from .data import DataSet, Images
from .errors import TrainingError
from .methods import build_model, build_optimizer
from .settings import Settings

TEST_BATCH_SIZE = 512
SECONDS_BETWEEN_LOOKS = 0.5


def _nothing() -> None:
    pass


class Trainer:
    """A network, its optimizer and schedule, and every source of chance, seeded.

    Two trainers with the same settings and data, or one that loaded the other's state, train the
    same weights, bit for bit on a CPU.

    Args:
        settings: of the run.
        data: on `device`.
        device: where everything runs.

    Raises:
        ValueError: the model or the optimizer refuses a setting.
    """

    def __init__(self, settings: Settings, data: DataSet, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.data = data
        self.device = device
        self.epoch = 0
        self.model = build_model(
            settings, in_channels=data.channels, num_classes=data.num_classes
        ).to(device)
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(settings, self.model)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, settings.milestones, gamma=0.1
        )
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.normalise = Normalisation(data.train.pixels)
        self.augment = Augmentation(settings.crop_padding, settings.flip, self.generator)

    @property
    def lr(self) -> float:
        """The filters' learning rate of the coming epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_epoch(self, between_steps: Callable[[], None] = _nothing) -> tuple[float, float]:
        """Train on every training image once; return the mean loss and the accuracy in percent.

        Args:
            between_steps: called before each step; what it raises ends the epoch there.

        Raises:
            TrainingError: the loss is not finite; the message names the epoch and the step.
        """
        self.model.train()
        images = self.data.train
        order = torch.randperm(len(images), generator=self.generator, device=self.device)
        batches = order.split(self.settings.batch_size)
        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        result = self._measure(title, images, batches, self._train_step, between_steps)
        self.scheduler.step()
        self.epoch += 1
        return result

    @torch.no_grad()
    def test(self, between_steps: Callable[[], None] = _nothing) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent on the test images.

        Args:
            between_steps: called before each batch; what it raises ends the test there.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.model.eval()
        images = self.data.test
        batches = torch.arange(len(images), device=self.device).split(TEST_BATCH_SIZE)
        return self._measure(
            f"test after epoch {self.epoch}", images, batches, self._test_step, between_steps
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that determines the coming epochs."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "device_type": self.device.type,
            "generators": self._generator_states(),
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
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(f"the checkpoint is of another network: {reason}") from error
        self._set_generator_states(state["generators"])
        self.epoch = state["epoch"]

    def _train_step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, outputs = self._forward(self.augment(pixels), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), outputs.detach()

    def _test_step(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._forward(pixels, labels)

    def _forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = self.normalise(pixels).contiguous(memory_format=self.memory_format)
        autocasts = self.settings.autocast != "off"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts):
            outputs = self.model(images)
            return F.cross_entropy(outputs, labels), outputs

    def _measure(
        self,
        title: str,
        images: Images,
        batches: Iterable[Tensor],
        step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        between_steps: Callable[[], None],
    ) -> tuple[float, float]:
        from tqdm import tqdm

        tally = _Tally()
        next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        with tqdm(total=len(images), desc=title, unit=" images", disable=None, leave=False) as bar:
            for indices in batches:
                between_steps()
                labels = images.labels[indices]
                loss, outputs = step(images.pixels[indices], labels)
                tally.add(loss, outputs, labels)
                bar.update(len(labels))
                if time.monotonic() >= next_look:
                    mean_loss, accuracy = tally.read(title)
                    bar.set_postfix_str(f"loss {mean_loss:.3f}, accuracy {accuracy:.1f} %")
                    next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        return tally.read(title)

    def _generator_states(self) -> dict[str, Tensor]:
        states = {"torch": torch.get_rng_state(), "data": self.generator.get_state()}
        if self.device.type != "cpu":
            states["device"] = torch.get_device_module(self.device).get_rng_state()
        return states

    def _set_generator_states(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["torch"])
        self.generator.set_state(states["data"])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states["device"])


class _Tally:
    """The losses and hits of a pass over images, left on the device until they are read."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.sizes: list[int] = []

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        self.losses.append(loss)
        self.hits.append((outputs.argmax(dim=1) == labels).sum())
        self.sizes.append(len(labels))

    def read(self, title: str) -> tuple[float, float]:
        """Wait for the device; return the mean loss and the accuracy in percent so far."""
        losses = torch.stack(self.losses).double().cpu()
        for step, loss in enumerate(losses.tolist(), start=1):
            if not math.isfinite(loss):
                raise TrainingError(f"the loss became {loss} in {title}, step {step}")
        images = sum(self.sizes)
        weights = torch.tensor(self.sizes, dtype=torch.float64) / images
        return float(weights @ losses), 100 * float(torch.stack(self.hits).sum()) / images
