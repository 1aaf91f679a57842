"""czm-train's own loop."""

from __future__ import annotations

import torch

from czm_fused.training import Config, data
from czm_fused.training.trainer import reference_trainer

from .images import CLASSES, CROP_PADDING
from .options import Options


class CZMTraining:
    """`czm-train` over `images`, an epoch at a time.

    Args:
        method: as `czm-train` knows it.
        depth: of the network.
        images: on the CPU; they are moved to `device` once.
        batch: images a step.
        device: where everything is.
        options: of speed.
        given: other settings of `czm-train`.
    """

    workers = 0
    seeds = 1

    def __init__(
        self,
        method: str,
        depth: int,
        images: data.Images,
        batch: int,
        device: torch.device,
        options: Options,
        **given: object,
    ) -> None:
        self.provider = "czm_train" if method == "czmig" else f"czm_train_{method}"
        self.options = options
        settings = {
            "method": method,
            "dataset": "cifar10",
            "depth": depth,
            "batch_size": batch,
            "crop_padding": CROP_PADDING,
            "last_batch": "keep",
            **options.settings(),
            **given,
        }
        images = images.to(device)
        self.data = data.DataSet(images, images, CLASSES)
        self.trainer = reference_trainer(Config(**settings).resolve(), self.data, device)

    def epoch(self) -> float:
        """Train on every image once; return the mean loss."""
        return self.trainer.train_epoch()[0]

    def input(self) -> None:
        """Gather, augment and normalise every image once, and train on none."""
        batches = self.trainer.batches
        for indices in batches.training():
            images = batches.normalise(batches.load_training(indices)[0])
            images.contiguous(memory_format=self.trainer.memory_format)
