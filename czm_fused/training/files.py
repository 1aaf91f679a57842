"""Files that are either the old ones or the new ones, whenever the process dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import TrainingError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; put it in `path`'s place once it is complete and on the disk.

    Args:
        path: what to create or replace. Its folder must exist.

    Raises:
        TrainingError: the disk refuses, for instance because it is full; `path` is as it was.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        # torch.save turns a full disk's OSError into a RuntimeError that does not speak of it.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        if isinstance(error, (OSError, RuntimeError)):
            raise TrainingError(f"cannot write {path}: {reason}") from error
        raise


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
