"""The batches of a training: of images on the device, or of the user's DataLoaders."""

# torch is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config
from .data import DataSet
from .errors import TrainingError

TEST_BATCH_SIZE = 512


class Normalisation:
    """Shift and scale every channel to zero mean and unit deviation over the uint8 `pixels`."""

    def __init__(self, pixels: Tensor) -> None:
        levels = torch.arange(256, dtype=torch.float64, device=pixels.device)
        channels = [channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)]
        counts, total = torch.stack(channels).double(), pixels[:, 0].numel()
        mean = counts @ levels / total
        std = (counts @ levels.square() / total - mean.square()).clamp(min=0).sqrt()
        self.mean = mean.float()[:, None, None]
        self.std = torch.where(std > 0, std, 1.0).float()[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std


def augment(pixels: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop images at random from their zero-padded selves, and mirror half, each on its own."""

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, device=pixels.device, generator=generator)

    if padding:
        pixels = crop(pixels, padding, *draw(2 * padding + 1, 2, len(pixels)))
    if flip:
        is_mirrored = draw(2, len(pixels)).bool()[:, None, None, None]
        pixels = torch.where(is_mirrored, pixels.flip(3), pixels)
    return pixels


def crop(pixels: Tensor, padding: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Pad each image with zeros, and cut its own size out of it again from a row and a column.

    Args:
        pixels: `(images, channels, height, width)`.
        rows: int64 in [0, 2 * padding], `(images,)`; `columns` alike.
    """
    height, width = pixels.shape[2:]
    windows = F.pad(pixels, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(pixels), device=pixels.device), :, rows, columns]


class DeviceBatches:
    """Batches of images on the device of `generator`, the source of order and augmentation.

    A batch is the indices of its images.
    """

    has_test = True
    generators: tuple[torch.Generator, ...] = ()

    def __init__(self, data: DataSet, config: Config, generator: torch.Generator) -> None:
        self.data, self.config, self.generator = data, config, generator
        self.batch_size: int | None = config.batch_size
        self.normalise = Normalisation(data.train.pixels)

    def training(self) -> list[Tensor]:
        """Return the batches of an epoch, in a new random order."""
        device, size = self.generator.device, self.config.batch_size
        order = torch.randperm(len(self.data.train), generator=self.generator, device=device)
        batches = list(order.split(size))
        joins = self.config.last_batch == "join" and 2 * len(batches[-1]) < size
        if joins and len(batches) > 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def testing(self) -> list[Tensor]:
        """Return the batches of the test images."""
        order = torch.arange(len(self.data.test), device=self.generator.device)
        return list(order.split(TEST_BATCH_SIZE))

    def load_training(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return augmented uint8 pixels and labels."""
        images = self.data.train.at(indices)
        options = self.config.crop_padding, self.config.flip, self.generator
        return augment(images.pixels, *options), images.labels

    def load_testing(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 pixels and labels."""
        images = self.data.test.at(indices)
        return images.pixels, images.labels

    def sample(self, images: int) -> Tensor:
        """Return some test images as the network reads them, of all places in the test set."""
        every = max(1, len(self.data.test) // images)
        return self.normalise(self.data.test.pixels[::every][:images])


class LoaderBatches:
    """Batches of the user's DataLoader, or of a pair of them for training and test, as they are.

    `generators` are the loaders' own, and `batch_size` is that of the training, None if unknown.
    """

    def __init__(self, data: Any, device: torch.device) -> None:
        loaders = tuple(data) if isinstance(data, (tuple, list)) else (data,)
        if len(loaders) not in (1, 2) or not isinstance(loaders[0], Iterable):
            raise TrainingError(
                "data must be a folder, a DataLoader or a pair of DataLoaders (training, test), "
                f"but was {type(data).__name__}"
            )
        self._loaders: tuple[Iterable[Any], ...] = loaders
        self._device = device
        self._sample: Tensor | None = None
        self.has_test = len(loaders) == 2 and loaders[1] is not None
        self.batch_size: int | None = getattr(loaders[0], "batch_size", None)
        owners = [each for loader in loaders for each in (loader, getattr(loader, "sampler", None))]
        found = (getattr(owner, "generator", None) for owner in owners)
        generators = [each for each in found if isinstance(each, torch.Generator)]
        self.generators = tuple(dict.fromkeys(generators))

    def training(self) -> Iterable[Any]:
        return self._loaders[0]

    def testing(self) -> Iterable[Any]:
        return self._loaders[1]

    def load_training(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels on the device."""
        pair = list(batch) if isinstance(batch, (tuple, list)) else []
        if len(pair) != 2 or not all(isinstance(each, Tensor) for each in pair):
            raise TrainingError(
                "a DataLoader must give pairs of tensors (images, labels), but gave "
                f"{type(batch).__name__}: choose its collate_fn so"
            )
        images, labels = (each.to(self._device, non_blocking=True) for each in pair)
        self._sample = images if self._sample is None else self._sample
        return images, labels

    load_testing = load_training

    def normalise(self, images: Tensor) -> Tensor:
        return images

    def sample(self, images: int) -> Tensor:
        """Return the first images that were loaded, of a training that has begun."""
        assert self._sample is not None
        return self._sample[:images]
