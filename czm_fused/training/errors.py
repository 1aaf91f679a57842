"""The errors that a training run reports to its user in one line."""

from __future__ import annotations

import importlib.util


class TrainingError(Exception):
    """A run cannot start or go on; the message says what was wrong and what would help."""


class DivergedError(TrainingError):
    """The loss became infinite or NaN."""


class MissingExtraError(TrainingError, ImportError):
    """An optional package is not installed."""


def require(*modules: str) -> None:
    """Check that `modules` are installed, without importing them.

    Raises:
        MissingExtraError: some are not; the message says how to install them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the training needs {', '.join(missing)}: pip install 'czm-fused[train]'"
        )
