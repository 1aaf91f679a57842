"""Checkpoints, and files that are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import TrainingError

FILE_NAME = "checkpoint.pt"
FORMAT = "czm-train checkpoint 3"
# Follows torch's zip archive, and is followed by the SHA-256 of the archive. torch.load reads
# such a file too: zip readers look for the archive's directory from the end.
_MARK = b"czm-train sha256"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values, to `path`, which is replaced whole."""
    archive = io.BytesIO()
    torch.save({"format": FORMAT, **state}, archive)
    content = archive.getvalue()
    with replacing(path) as file:
        file.write(content + _MARK + hashlib.sha256(content).digest())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote to `path`, or into the folder of a run; runs no code from the file.

    Raises:
        TrainingError: the checkpoint is missing, damaged, or not one of czm-train.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise TrainingError(f"no checkpoint at {path}: start without --resume")
    content, mark, digest = path.read_bytes().rpartition(_MARK)
    is_marked = len(digest) == hashlib.sha256().digest_size
    if is_marked and digest != hashlib.sha256(content).digest():
        raise TrainingError(f"the checkpoint {path} is damaged: its checksum does not fit")
    try:
        archive = io.BytesIO(content + mark + digest)
        state = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever parser meets the damage
        raise TrainingError(f"the checkpoint {path} is truncated or damaged") from error
    if not is_marked or not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of this version of czm-train")
    return state


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which becomes `path` once it is complete and on the disk."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
