"""CIFAR-10, averaged to 16 pixels, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from common.images import averaged
from torch import Tensor

HELD_OUT = 5_000
SIZE = 16


def load(path: Path) -> dict[str, Tensor]:
    """Return images (uint8, of shape (N, 3, 16, 16)) and labels of the parts train and test.

    Args:
        path: a folder `{train,test}/<class>/*.png` of images of 16 or 32 pixels, or the file that
            an earlier call made of it, which is beside it under the same name with the suffix .pt.
    """
    path = path.resolve()
    file = path if path.suffix == ".pt" else path.with_suffix(".pt")
    if not file.exists():
        parts = {}
        for part in ("train", "test"):
            parts[f"{part}_images"], parts[f"{part}_labels"] = _read(path / part)
        # The classes come in turn, and the last images are held out.
        order = torch.randperm(
            len(parts["train_labels"]), generator=torch.Generator().manual_seed(0)
        )
        for key in ("train_images", "train_labels"):
            parts[key] = parts[key][order].contiguous()
        torch.save(parts, file)
    loaded: dict[str, Tensor] = torch.load(file)
    return loaded


def _read(folder: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    images, labels = [], []
    for image, label in ImageFolder(str(folder), pil_to_tensor):
        images.append(averaged(image, SIZE))
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


class Images:
    """The images of one training: what it learns from, what settings are chosen on, the test.

    Args:
        path: as in `load`.
    """

    def __init__(self, path: Path) -> None:
        data = load(path)
        count = len(data["train_labels"]) - HELD_OUT
        self.train = data["train_images"][:count], data["train_labels"][:count]
        self.held_out = data["train_images"][count:], data["train_labels"][count:]
        self.test = data["test_images"], data["test_labels"]
        pixels = self.train[0].transpose(0, 1).flatten(1).float()
        self.mean, self.std = (s.view(1, 3, 1, 1) for s in (pixels.mean(1), pixels.std(1)))

    def inputs(self, images: Tensor) -> Tensor:
        """Return images as the networks take them: float32, normalised, channels last."""
        x = (images.float() - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` shuffled batches, half of the images flipped, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.train
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order.split(size):
                if steps == 0:
                    return
                if len(chosen) < size:
                    continue
                flips = torch.rand(size, generator=generator) < 0.5
                x = images[chosen]
                yield (
                    self.inputs(torch.where(flips.view(-1, 1, 1, 1), x.flip(3), x)),
                    labels[chosen],
                )
                steps -= 1
