"""CIFAR-shaped images, for both loops: as uint8 tensors, and one by one as Pillow's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from czm_fused.training import data
from czm_fused.training.batches import Normalisation

CLASSES = 10
SIZE = 32
CROP_PADDING = 4


def synthetic(count: int) -> data.Images:
    """Return random images that can be told apart: a pattern a class, and noise on it."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=torch.uint8)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    patterns = draw(0, 128, CLASSES, 3, SIZE // 8, SIZE // 8)
    patterns = patterns.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return data.Images(patterns[labels] + draw(0, 128, count, 3, SIZE, SIZE), labels)


def averaged(image: Tensor, size: int) -> Tensor:
    """Return a uint8 image, `(3, H, W)`, averaged to `size` pixels and rounded, if it has more."""
    if image.shape[-1] <= size:
        return image
    return F.adaptive_avg_pool2d(image.float(), size).round().to(torch.uint8)


def from_folder(folder: Path, count: int) -> data.Images:
    """Return images drawn from `folder`/train/<class>/, as `czm-train --data-dir` reads them.

    Raises:
        ValueError: there are too few.
        TrainingError: there are none.
    """
    images = data.image_folder(folder).train
    if len(images) < count:
        raise ValueError(f"--data-dir {folder} has {len(images)} images of {count}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return data.Images(images.pixels[order], images.labels[order])


class PillowDataSet(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The images as torchvision's CIFAR10 gives them, through torchvision's transforms."""

    def __init__(self, images: data.Images) -> None:
        from torchvision import transforms

        normalise = Normalisation(images.pixels)
        self._pixels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = images.labels.tolist()
        self._transform: Callable[[Any], Tensor] = transforms.Compose(
            [
                transforms.RandomCrop(self._pixels.shape[1:3], padding=CROP_PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(
                    (normalise.mean.flatten() / 255).tolist(),
                    (normalise.std.flatten() / 255).tolist(),
                ),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]
