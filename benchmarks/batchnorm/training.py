"""One method in training, and the interleaved rounds of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from throughput import timing
from torch import Tensor
from torch.nn import functional as F

from . import networks

# The deadline ends the rounds; medians of more would say no more.
_MOST_ROUNDS = 1000
_PHASES = ("forward", "backward", "optimizer")


class Training:
    """A network, its optimizer and one batch of random images, on which every step is taken.

    Args:
        model: one of `networks.NETWORKS`.
        method: one of `networks.METHODS`.
        images: `(batch, 3, size, size)`; they say which device.
        labels: `(batch,)`.
    """

    def __init__(self, model: str, method: str, images: Tensor, labels: Tensor) -> None:
        self.method = method
        self.images, self.labels = images, labels
        self.model = networks.build(model, method, images.shape[-1]).to(images.device)
        self.optimizer = networks.make_optimizer(self.model, method)
        if networks.METHODS[method].compiled:
            self.model.compile()
        self._synchronize = timing.synchronizer(images.device)
        self.phases: list[tuple[float, ...]] = []

    def forward(self) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.model(self.images), self.labels)

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
        with torch.inference_mode():
            self.model(self.images)


def time_all(trainings: Sequence[Training], seconds: float) -> dict[str, dict[str, float]]:
    """Time steps, then steps in their phases, then inference, each in interleaved rounds.

    Args:
        trainings: what is compared.
        seconds: for all three together; a round that has begun is finished.

    Returns:
        The medians by metric and method, in microseconds.
    """
    results = {"step": _medians(trainings, [t.step for t in trainings], seconds / 3)}
    _medians(trainings, [t.step_in_phases for t in trainings], seconds / 3)
    for training in trainings:
        medians = np.median(training.phases[timing.WARM_UP_ROUNDS :], axis=0)
        for phase, median in zip(_PHASES, medians, strict=True):
            results.setdefault(phase, {})[training.method] = float(median)
    for training in trainings:
        training.model.eval()
    results["inference"] = _medians(trainings, [t.infer for t in trainings], seconds / 3)
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
