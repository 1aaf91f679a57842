"""Checkpoints, and files that are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import TrainingError, explained

FILE_NAME = "checkpoint.pt"
DRAFT_SUFFIX = ".tmp"
FORMAT = b"czm-train checkpoint 4"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values, to `path`, which is replaced whole."""
    archive = io.BytesIO()
    torch.save(state, archive)
    content = archive.getvalue()
    with replacing(path) as file:
        # torch.load reads such a file too: it looks for the archive's directory from the end.
        file.write(content + _digest(content))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote to `path`, or into the folder of a run; runs no code from the file.

    Raises:
        TrainingError: the checkpoint is missing, damaged, or not one of czm-train.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise TrainingError(f"no checkpoint at {path}: start without --resume")
    file = path.read_bytes()
    content = file[: -len(_digest(b""))]
    if file != content + _digest(content):
        raise TrainingError(
            f"{path} is truncated or damaged, or not a checkpoint of this version of czm-train"
        )
    with explained(f"cannot read the checkpoint {path}"):
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
    return state


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(FORMAT + content).digest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which becomes `path` once it is complete and on the disk."""
    draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT_SUFFIX}")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
