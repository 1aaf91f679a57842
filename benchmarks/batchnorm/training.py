"""One method in training, and the interleaved rounds of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from throughput import timing
from torch import Tensor
from torch.nn import functional as F

from . import networks

# The deadline ends the rounds; medians of more would say no more.
_MOST_ROUNDS = 1000
_PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Precision:
    """How networks compute, and how images lie in memory.

    Attributes:
        autocast: "bfloat16" or "float16", or "" for float32 throughout.
        channels_last: whether images and convolutions' weights are channels-last.
    """

    autocast: str = ""
    channels_last: bool = False

    @property
    def dtype(self) -> str:
        """Of the activations, and whether the weights have it too."""
        return f"{self.autocast} autocast" if self.autocast else "float32"

    def epsilon(self, device: torch.device) -> float:
        """Return the relative spacing of the numbers that convolutions multiply."""
        if not self.autocast and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            return 2.0**-10
        return torch.finfo(getattr(torch, self.autocast or "float32")).eps

    def context(self, device: torch.device) -> Any:
        if not self.autocast:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, getattr(torch, self.autocast))

    def lay_out(self, what: Any) -> Any:
        """Return a module or images in the memory format."""
        return what.to(memory_format=torch.channels_last) if self.channels_last else what


class Training:
    """A network, its optimizer and one batch of random images, on which every step is taken.

    Args:
        model: one of `networks.NETWORKS`.
        method: one of `networks.METHODS`.
        images: `(batch, 3, size, size)`; they say which device.
        labels: `(batch,)`.
        precision: of the forward pass.
        backend: of `torch.compile`, for methods that are compiled.
    """

    def __init__(
        self,
        model: str,
        method: str,
        images: Tensor,
        labels: Tensor,
        precision: Precision,
        backend: str = "inductor",
    ) -> None:
        self.method = method
        self.precision = precision
        self.images, self.labels = precision.lay_out(images), labels
        built = networks.build(model, method, images.shape[-1]).to(images.device)
        self.model = precision.lay_out(built)
        self.optimizer = networks.make_optimizer(self.model, method)
        if networks.METHODS[method].compiled:
            # Noise from torch's generator: the gradients are to be compared with eager ones.
            with_generator = {"fallback_random": True} if backend == "inductor" else None
            self.model.compile(backend=backend, options=with_generator, dynamic=False)
        self._synchronize = timing.synchronizer(images.device)
        self.phases: list[tuple[float, ...]] = []

    def forward(self) -> Tensor:
        """Return the loss."""
        with self.precision.context(self.images.device):
            return F.cross_entropy(self.model(self.images), self.labels)

    def gradients(self) -> tuple[float, Tensor]:
        """Return the loss and all gradients in one tensor, with the noise of seed 0."""
        torch.manual_seed(0)
        loss = self.forward()
        loss.backward()
        found = [parameter.grad for parameter in self.model.parameters()]
        self.optimizer.zero_grad()
        return loss.item(), torch.cat([grad.flatten() for grad in found if grad is not None])

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
        self._synchronize()
        times = [time.perf_counter_ns()]
        loss = self.forward()
        self._lap(times)
        loss.backward()
        self._lap(times)
        self.update()
        self._lap(times)
        self.phases.append(tuple(float(each) / 1e3 for each in np.diff(times)))

    def _lap(self, times: list[int]) -> None:
        self._synchronize()
        times.append(time.perf_counter_ns())

    def infer(self) -> None:
        """Run the network without a graph."""
        with torch.inference_mode(), self.precision.context(self.images.device):
            self.model(self.images)


def time_all(trainings: Sequence[Training], seconds: float) -> dict[str, dict[str, float]]:
    """Time steps, then steps in their phases, then inference, each in interleaved rounds.

    Args:
        trainings: what is compared.
        seconds: half of it for steps, a quarter for each of the others; a round that has begun is
            finished.

    Returns:
        The medians by metric and method, in microseconds.
    """
    results = {"step": _medians(trainings, [t.step for t in trainings], seconds / 2)}
    _medians(trainings, [t.step_in_phases for t in trainings], seconds / 4)
    for training in trainings:
        medians = np.median(training.phases[timing.WARM_UP_ROUNDS :], axis=0)
        for phase, median in zip(_PHASES, medians, strict=True):
            results.setdefault(phase, {})[training.method] = float(median)
    for training in trainings:
        training.model.eval()
    results["inference"] = _medians(trainings, [t.infer for t in trainings], seconds / 4)
    for training in trainings:
        training.model.train()
    return results


def _medians(
    trainings: Sequence[Training], calls: Sequence[Callable[[], object]], seconds: float
) -> dict[str, float]:
    synchronize = timing.synchronizer(trainings[0].images.device)
    wall, _ = timing.time_rounds(calls, synchronize, _MOST_ROUNDS, seconds)
    medians = np.median(wall, axis=0)
    return {t.method: float(each) for t, each in zip(trainings, medians, strict=True)}
