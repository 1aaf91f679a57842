"""The checkpoint: everything a run needs to go on, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import TrainingError
from .files import replacing

FILE_NAME = "checkpoint.pt"
FORMAT = "czm-train checkpoint 1"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, which keeps its old content until the new one is on the disk.

    Args:
        path: the checkpoint file.
        state: tensors and plain Python values.

    Raises:
        TrainingError: the file cannot be written.
    """
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, with its tensors on the CPU. Runs no code from the file.

    Args:
        path: the checkpoint file, or the folder of a run.

    Raises:
        TrainingError: there is none, or it is damaged, or not one of ours.
    """
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise TrainingError(f"no checkpoint at {path}: start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whichever parser meets the damage
        raise TrainingError(f"the checkpoint {path} is truncated or damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of this version of czm-train")
    return state
