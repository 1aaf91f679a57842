"""Every way to train must train the same before any is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from .options import Options

EPOCHS = 3


class Training(Protocol):
    """What is measured."""

    provider: str
    options: Options
    seeds: int
    workers: int

    def epoch(self) -> float: ...

    def input(self) -> None: ...


class DisagreementError(Exception):
    """A training does not learn, or not what the one without options learns."""


def check(makers: Sequence[Callable[[], Training]]) -> None:
    """Train each for `EPOCHS`, and compare its losses with those of the first of its provider.

    Losses may differ by what the options round: with factors of 8 bits (bfloat16) or 11 bits (TF32)
    by 16 units of those; in float32, where an epoch's steps amplify the order of sums, by 1e-3.

    Raises:
        DisagreementError: a loss is not finite, does not fall, or is another.
    """
    expected: dict[tuple[str, int], list[float]] = {}
    for make in makers:
        training = make()
        name = f"{training.provider} with {training.options}"
        losses = [training.epoch() for _ in range(EPOCHS)]
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
            raise DisagreementError(f"{name} does not learn: its losses were {shown}")
        first = expected.setdefault((training.provider, training.workers), losses)
        share = _tolerance(training.options)
        for loss, known in zip(losses, first, strict=True):
            if abs(loss - known) > share * known:
                raise DisagreementError(
                    f"{name} trains something else: its losses were {shown}, and "
                    f"{', '.join(f'{each:.4f}' for each in first)} without options"
                )


def _tolerance(options: Options) -> float:
    if options.autocast != "off":
        return 16 * 2**-8
    return 16 * 2**-11 if options.tf32 else 1e-3
