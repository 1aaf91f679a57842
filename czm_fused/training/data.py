"""The data sets, as uint8 tensors."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import cache
from .config import ResolvedConfig
from .errors import TrainingError, require

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "validation")


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


def load(config: ResolvedConfig) -> DataSet:
    """Read the data set that `config` names into the CPU's memory.

    Raises:
        TrainingError: it is missing, empty or broken; the message names the folder or the file.
        MissingExtraError: the package that reads it is not installed.
    """
    whole = _load(config)
    return hold_out(whole, config.hold_out) if config.hold_out else whole


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


def _load(config: ResolvedConfig) -> DataSet:
    if config.dataset == "digits":
        return digits()
    if config.data_dir is None:
        raise TrainingError(f"--dataset {config.dataset} needs --data-dir")
    folder = Path(config.data_dir)
    if config.dataset == "cifar10":
        return cifar10(folder, download=config.download)
    workers = config.workers or os.cpu_count() or 1
    return image_folder(folder, workers=workers, cache_dir=cache.folder(config.cache_dir))


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
    """Return CIFAR-10 as torchvision stores it in `folder`."""
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


def image_folder(folder: Path, *, workers: int = 1, cache_dir: Path | None = None) -> DataSet:
    """Return the images of `folder`/train/<class>/ and `folder`/test/<class>/, as RGB.

    Args:
        folder: as torchvision's ImageFolder expects it, twice; `val` or `validation` may take the
            place of `test`. All images have one size.
        workers: threads that decode.
        cache_dir: folder where the decoded images are kept; None keeps none.

    Raises:
        TrainingError: the folder or a file in it is missing or broken.
    """
    require("PIL")
    tests = [name for name in TEST_FOLDERS if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        if folder.name in ("train", *TEST_FOLDERS) and folder.is_dir():
            raise TrainingError(
                f"--data-dir must hold train/ and test/, but was one of them: give {folder.parent}"
            )
        missing = "test/ (or val/)" if (folder / "train").is_dir() else "train/"
        raise TrainingError(f"--data-dir {folder} has no folder {missing} with a folder a class")
    parts = ("train", tests[0])
    classes = [_classes(folder / part) for part in parts]
    if classes[0] != classes[1]:
        difference = ", ".join(sorted(set(classes[0]) ^ set(classes[1])))
        raise TrainingError(
            f"{parts[0]}/ and {parts[1]}/ under {folder} have different classes: only one of them "
            f"has {difference}"
        )
    train, test = (_read_part(folder / part, classes[0], workers, cache_dir) for part in parts)
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise TrainingError(f"{parts[0]}/ and {parts[1]}/ under {folder} differ in image size")
    return DataSet(train, test, num_classes=len(classes[0]))


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise TrainingError(f"no images under {folder}: it needs a folder a class")
    return names


def _read_part(
    folder: Path, classes: Sequence[str], workers: int, cache_dir: Path | None
) -> Images:
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(_image_files(folder / name, ()))
        if not found:
            raise TrainingError(f"no images under {folder / name}: remove the folder or fill it")
        files += found
        labels += [label] * len(found)
    key = cache.key(folder, files)
    pixels = None if cache_dir is None else cache.read(cache_dir, key)
    if pixels is None:
        pixels = _decode_all([path for path, _, _ in files], f"reading {folder.name}", workers)
        if cache_dir is not None:
            cache.write(cache_dir, key, pixels)
    return Images(pixels, torch.tensor(labels))


def _image_files(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Yield path, bytes and time of every image file under `folder`, through symbolic links."""
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        for entry in os.scandir(folder):
            if entry.is_dir():
                yield from _image_files(Path(entry.path), (*above, here))
            elif entry.name.lower().endswith(EXTENSIONS):
                found = entry.stat()
                if not stat.S_ISREG(found.st_mode):
                    raise TrainingError(f"{entry.path} must be a file, but is a device or pipe")
                yield entry.path, found.st_size, found.st_mtime_ns
    except OSError as error:
        raise TrainingError(f"cannot read the image folder {folder}: {error}") from error


def _decode_all(paths: Sequence[str], title: str, workers: int) -> Tensor:
    from tqdm import tqdm

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
        for _ in tqdm(results, title, total=len(paths), unit="img", disable=None, leave=False):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


def _decode(path: str) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels (mode {image.mode}) have no fixed range: save 8 bits")
            if image.mode.startswith("I;16"):
                # convert() would clip at 255; the upper byte is what Pillow takes of 16-bit colour.
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                pixels = np.stack([grey] * 3, axis=2)
            else:
                pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's formats fail in many ways on a broken file
        raise TrainingError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
