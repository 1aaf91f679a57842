"""czm-train's own loop, of one seed or of several together."""

from __future__ import annotations

import torch

from czm_fused.training import data
from czm_fused.training.loop import Trainer, train_epoch
from czm_fused.training.settings import resolve

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
        seeds: how many are trained together.
        given: other settings of `czm-train`.
    """

    workers = 0

    def __init__(
        self,
        method: str,
        depth: int,
        images: data.Images,
        batch: int,
        device: torch.device,
        options: Options,
        seeds: int = 1,
        **given: object,
    ) -> None:
        self.provider = "czm_train" if method == "czmig" else f"czm_train_{method}"
        self.options = options
        self.seeds = seeds
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
        self.trainers = [
            Trainer(resolve({**settings, "seed": seed}), self.data, device)
            for seed in range(seeds)
        ]

    def epoch(self) -> float:
        """Train every seed on every image once; return the first one's mean loss."""
        return train_epoch(self.trainers)[0][0]

    def input(self) -> None:
        """Gather, augment and normalise every image once, and train on none."""
        trainer = self.trainers[0]
        order = torch.randperm(
            len(self.data.train), generator=trainer.generator, device=trainer.device
        )
        for indices in order.split(trainer.settings.batch_size):
            images = trainer.normalise(trainer.augment(self.data.train.pixels[indices]))
            images.contiguous(memory_format=trainer.memory_format)
