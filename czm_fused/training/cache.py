"""Decoded images, kept between runs as memory-mapped files."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import replacing
from .errors import TrainingError

# Changes when images are decoded in another way.
_VERSION = "1"


def folder(chosen: str | None) -> Path:
    """Return the cache folder: `chosen`, or `czm-fused` where the user's caches are."""
    if chosen is not None:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache", "czm-fused")


def key(images: Path, files: Sequence[tuple[str, int, int]]) -> str:
    """Return the name of the cache file of a folder of images.

    Args:
        images: the folder.
        files: path, bytes and time of modification in ns of each image.
    """
    place = os.path.realpath(images)
    content = hashlib.sha256(_VERSION.encode())
    start = len(str(images))
    for path, size, time in files:
        content.update(f"{path[start:]}\0{size}\0{time}\0".encode(errors="replace"))
    return f"{_digest(place)}-{content.hexdigest()[:16]}.npy"


def read(cache: Path, name: str) -> Tensor | None:
    """Return the images of the cache file `name`, uint8, mapped into memory; None without one."""
    import numpy as np

    try:
        return torch.from_numpy(np.load(cache / name, mmap_mode="c"))
    except (OSError, ValueError, TypeError):
        return None


def write(cache: Path, name: str, pixels: Tensor) -> None:
    """Keep `pixels` as the cache file `name`, in the place of those of an older folder content.

    A folder that is full or read-only costs a warning.
    """
    import numpy as np

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(cache / name) as file:
            np.save(file, pixels.numpy())
        for old in cache.glob(f"{name.partition('-')[0]}-*.npy"):
            if old.name != name:
                old.unlink()
    except (OSError, TrainingError) as error:
        reason = " ".join(str(error).split())
        print(
            f"czm-train: warning: decoded images are not kept in {cache} ({reason}): "
            "choose another --cache-dir to start faster",
            file=sys.stderr,
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
