"""The optional packages of the training, asked for before anything starts."""

import importlib.util

from .errors import TrainingError


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
            f"the training needs {', '.join(missing)}: pip install czm-fused[train]"
        )
