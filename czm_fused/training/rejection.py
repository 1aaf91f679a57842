"""How far the layers of a network in training reject mean shift, for the logs."""

from __future__ import annotations

import math

from ..diagnostics import diagnose
from .loop import Trainer

IMAGES = 128
TIMES = 20
_MOST = 200.0  # dB; where float32 cannot see what is left of a shift


def is_due(epoch: int, epochs: int) -> bool:
    """Return whether rejection is measured after `epoch`: about `TIMES` times in a run."""
    return epoch % max(1, epochs // TIMES) == 0 or epoch == epochs


def rejection(trainer: Trainer) -> dict[str, float]:
    """Return the common-mode rejection of every convolution on some test images, dB.

    Changes nothing, and draws no random numbers.
    """
    # Folders of images are sorted by class.
    every = max(1, len(trainer.data.test) // IMAGES)
    pixels = trainer.data.test.pixels[::every][:IMAGES]
    images = trainer.normalise(pixels).contiguous(memory_format=trainer.memory_format)
    found = {}
    for layer in diagnose(trainer.model, images, trainer.optimizer).layers:
        ratio = layer.rejection_db
        if ratio is not None and not math.isnan(ratio):
            found[layer.name] = round(max(-_MOST, min(ratio, _MOST)), 3)
    return found
