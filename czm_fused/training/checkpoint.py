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

from .errors import TrainingError

FILE_NAME = "checkpoint.pt"
FORMAT = "czm-train checkpoint 2"
# Follows torch's zip archive, and is followed by the SHA-256 of the archive. torch.load reads
# such a file too: zip readers look for the archive's directory from the end.
_MARK = b"czm-train sha256"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, which keeps its old content until the new one is on the disk.

    Args:
        path: the checkpoint file.
        state: tensors and plain Python values.

    Raises:
        TrainingError: the file cannot be written.
    """
    archive = io.BytesIO()
    torch.save({"format": FORMAT, **state}, archive)
    content = archive.getvalue()
    with replacing(path) as file:
        file.write(content + _MARK + hashlib.sha256(content).digest())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, with its tensors on the CPU. Runs no code from the file.

    Args:
        path: the checkpoint file, or the folder of a run.

    Raises:
        TrainingError: the checkpoint is missing, damaged, or not one of czm-train.
    """
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise TrainingError(f"no checkpoint at {path}: start without --resume")
    content = path.read_bytes()
    size = len(content) - len(_MARK) - hashlib.sha256().digest_size
    is_marked = content[max(size, 0) :].startswith(_MARK)
    if is_marked and content[size + len(_MARK) :] != hashlib.sha256(content[:size]).digest():
        raise TrainingError(f"the checkpoint {path} is damaged: its checksum does not fit")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever parser meets the damage
        raise TrainingError(f"the checkpoint {path} is truncated or damaged") from error
    if not is_marked or not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of this version of czm-train")
    return state


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; rename it to `path` once it is complete and on the disk.

    Args:
        path: file to create or replace, in a folder that exists.

    Raises:
        TrainingError: the disk refuses, for instance because it is full; `path` is as it was.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise TrainingError(f"cannot write {path}: {error}") from error
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
