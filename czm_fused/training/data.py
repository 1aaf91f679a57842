"""The data sets, decoded once into uint8 tensors that live on the training device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import TrainingError
from .extras import require
from .settings import Settings


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: uint8, `(images, channels, height, width)`.
        labels: int64, `(images,)`.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Tensor) -> Images:
        return Images(self.pixels[indices], self.labels[indices])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DataSet:
    """The training and the test images of `num_classes` classes."""

    train: Images
    test: Images
    num_classes: int

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    def to(self, device: torch.device) -> DataSet:
        return DataSet(self.train.to(device), self.test.to(device), self.num_classes)


def load(settings: Settings) -> DataSet:
    """Read the data set that `settings` name, into the CPU's memory.

    Raises:
        TrainingError: it is missing, empty or broken; the message names the folder or the file.
        MissingExtraError: the package that reads it is not installed.
    """
    whole = _load(settings)
    return hold_out(whole, settings.hold_out) if settings.hold_out else whole


def hold_out(whole: DataSet, images: int) -> DataSet:
    """Return the training images of `whole` alone, `images` of them, always the same, as the test.

    Raises:
        TrainingError: there are not so many.
    """
    count = len(whole.train)
    if images >= count:
        raise TrainingError(f"--hold-out must be less than {count} images, but was {images}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, kept = order[:images], order[images:]
    return DataSet(whole.train.at(kept), whole.train.at(held), whole.num_classes)


def _load(settings: Settings) -> DataSet:
    if settings.dataset == "digits":
        return digits()
    if settings.data_dir is None:
        raise TrainingError(f"--dataset {settings.dataset} needs --data-dir")
    folder = Path(settings.data_dir)
    if settings.dataset == "cifar10":
        return cifar10(folder, download=settings.download)
    return image_folder(folder, workers=settings.workers or os.cpu_count() or 1)


def digits() -> DataSet:
    """Return scikit-learn's bundled handwritten digits: 8x8, one channel, values 0 to 16.

    The first half trains (898 images), the second tests (899, by other writers).
    """
    require("sklearn")
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = torch.from_numpy(bundle.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).long()
    half = len(labels) // 2
    return DataSet(
        train=Images(pixels[:half], labels[:half]),
        test=Images(pixels[half:], labels[half:]),
        num_classes=10,
    )


def cifar10(folder: Path, *, download: bool) -> DataSet:
    """Return CIFAR-10 as torchvision keeps it under `folder`."""
    require("torchvision")
    from torchvision.datasets import CIFAR10

    if not download and not folder.is_dir():
        raise TrainingError(f"--data-dir {folder} does not exist: use --download to create it")

    def part(train: bool) -> Images:
        try:
            source = CIFAR10(str(folder), train=train, download=download)
        except (RuntimeError, OSError) as error:
            remedy = "try again" if download else "use --download to fetch it"
            raise TrainingError(
                f"no CIFAR-10 under --data-dir {folder} ({error}): {remedy}"
            ) from error
        pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(source.targets))

    return DataSet(train=part(True), test=part(False), num_classes=10)


def image_folder(folder: Path, *, workers: int = 1) -> DataSet:
    """Return the images under `folder`/train/<class>/ and `folder`/test/<class>/, as RGB.

    Args:
        folder: as torchvision's ImageFolder expects it, twice. All images have one size.
        workers: threads that decode.
    """
    require("torchvision", "PIL")
    from torchvision.datasets import ImageFolder

    sources = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise TrainingError(f"--data-dir {folder} has no folder {part}/ with a folder a class")
        try:
            sources[part] = ImageFolder(str(folder / part))
        except FileNotFoundError as error:
            reason = str(error).replace("\n", " ")
            raise TrainingError(f"no images under {folder / part}: {reason}") from error
    if sources["train"].classes != sources["test"].classes:
        difference = sorted(set(sources["train"].classes) ^ set(sources["test"].classes))
        raise TrainingError(
            f"train/ and test/ under {folder} have different classes: only one of them has "
            + ", ".join(difference)
        )
    train, test = (
        _decode_all(sources[part].samples, f"reading {part} images", workers)
        for part in ("train", "test")
    )
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise TrainingError(f"train/ and test/ under {folder} have images of different sizes")
    return DataSet(train, test, num_classes=len(sources["train"].classes))


def _decode_all(samples: Sequence[tuple[str, int]], title: str, workers: int) -> Images:
    from tqdm import tqdm

    paths = [path for path, _ in samples]
    size = tuple(_decode(paths[0]).shape)
    pixels = torch.empty(len(paths), *size, dtype=torch.uint8)

    def decode_into_place(index: int) -> None:
        image = _decode(paths[index])
        if tuple(image.shape) != size:
            raise TrainingError(
                f"images must have one size: {paths[index]} is {image.shape[2]}x{image.shape[1]}, "
                f"{paths[0]} is {size[2]}x{size[1]}"
            )
        pixels[index] = image

    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(decode_into_place, range(len(paths)))
        for _ in tqdm(results, title, total=len(paths), unit="images", disable=None, leave=False):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return Images(pixels, torch.tensor([label for _, label in samples]))


def _decode(path: str) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's formats fail in many ways on a broken file
        raise TrainingError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
