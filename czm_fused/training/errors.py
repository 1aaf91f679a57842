"""The errors that a training reports to its user in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingError(Exception):
    """A run cannot start or go on; the message says what was wrong and what would help."""


class DivergedError(TrainingError):
    """The loss became infinite or NaN."""


class CheckpointError(TrainingError):
    """A run cannot go on from its checkpoint, here or with these options."""


@contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Raise an error of the block as a TrainingError: `what (its first line): remedy`."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise TrainingError(f"{what} ({reason})" + (f": {remedy}" if remedy else "")) from error
