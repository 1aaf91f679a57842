"""Where the batches of a training come from: images on the device, or the user's DataLoaders."""

# torch is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Augmentation, Normalisation
from .config import ResolvedConfig
from .data import DataSet
from .errors import TrainingError

TEST_BATCH_SIZE = 512


class DeviceBatches:
    """Batches of images that are on the device; a batch is the indices of its images.

    Args:
        data: on `device`.
        config: the run's, resolved.
        generator: source of the order and the augmentation, on `device`.
    """

    has_test = True

    def __init__(self, data: DataSet, config: ResolvedConfig, generator: torch.Generator) -> None:
        self.data = data
        self.normalise = Normalisation(data.train.pixels)
        self.augment = Augmentation(config.crop_padding, config.flip, generator)
        self._config = config
        self._generator = generator

    def training(self) -> list[Tensor]:
        """Return the batches of an epoch, in a new random order."""
        order = torch.randperm(
            len(self.data.train), generator=self._generator, device=self._generator.device
        )
        return split(order, self._config.batch_size, self._config.last_batch)

    def testing(self) -> list[Tensor]:
        """Return the batches of the test images."""
        return list(
            torch.arange(len(self.data.test), device=self._generator.device).split(TEST_BATCH_SIZE)
        )

    def load_training(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return augmented uint8 pixels and labels."""
        images = self.data.train.at(indices)
        return self.augment(images.pixels), images.labels

    def load_testing(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 pixels and labels."""
        images = self.data.test.at(indices)
        return images.pixels, images.labels

    def size_of(self, batch: Tensor) -> int:
        """Return the number of images of a batch."""
        return len(batch)

    def sample(self, images: int) -> Tensor:
        """Return some test images as the network reads them; those of a folder are in its order."""
        every = max(1, len(self.data.test) // images)
        return self.normalise(self.data.test.pixels[::every][:images])


class LoaderBatches:
    """Batches of the user's own DataLoaders, of images and labels, taken as they are.

    Args:
        train: yields the training batches of an epoch.
        test: yields those of the test, or None for no test.
        device: where the batches go.
    """

    def __init__(
        self, train: Iterable[Any], test: Iterable[Any] | None, device: torch.device
    ) -> None:
        self._train, self._test, self._device = train, test, device
        self.has_test = test is not None
        self._sample: Tensor | None = None

    def training(self) -> Iterable[Any]:
        """Return the training batches."""
        return self._train

    def testing(self) -> Iterable[Any]:
        """Return the test batches."""
        return () if self._test is None else self._test

    def load_training(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels on the device.

        Raises:
            TrainingError: the batch is not a pair of tensors.
        """
        if not (
            isinstance(batch, (tuple, list))
            and len(batch) == 2
            and all(isinstance(each, Tensor) for each in batch)
        ):
            raise TrainingError(
                "a DataLoader must give pairs of tensors (images, labels), but gave "
                f"{type(batch).__name__}: choose its collate_fn so"
            )
        images, labels = (each.to(self._device, non_blocking=True) for each in batch)
        if self._sample is None:
            self._sample = images
        return images, labels

    load_testing = load_training

    def size_of(self, batch: Any) -> int:
        """Return the number of images of a batch."""
        return len(batch[1])

    def normalise(self, images: Tensor) -> Tensor:
        return images

    def sample(self, images: int) -> Tensor | None:
        """Return the first images that were loaded."""
        return None if self._sample is None else self._sample[:images]


def split(order: Tensor, size: int, last_batch: str) -> list[Tensor]:
    """Split the images of an epoch into batches.

    Args:
        order: the images' indices, `(images,)`.
        size: images a batch.
        last_batch: `"keep"` makes the remainder a batch of its own, `"join"` adds it to the batch
            before if it is less than half a batch.
    """
    batches = list(order.split(size))
    if last_batch == "join" and len(batches) > 1 and 2 * len(batches[-1]) < size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def of_loaders(data: Any, device: torch.device) -> LoaderBatches:
    """Return the batches of a DataLoader, or of a pair of them for training and test.

    Raises:
        TrainingError: `data` is neither.
    """
    train, test, *rest = (*data, None) if isinstance(data, (tuple, list)) else (data, None)
    if rest not in ([], [None]) or not isinstance(train, (DataLoader, Iterable)):
        raise TrainingError(
            "data must be a folder, a DataLoader or a pair of DataLoaders (training, test), but "
            f"was {type(data).__name__}"
        )
    return LoaderBatches(train, test, device)
