"""The data sets, as uint8 tensors; decoded images of folders are kept between runs."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import hashlib
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import replacing
from .config import Config
from .errors import TrainingError, explained

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
_CACHE_VERSION = "1"  # changes when images are decoded in another way


@dataclass(frozen=True)
class Images:
    """Labelled images: uint8 `(images, channels, height, width)`, and int64 `(images,)`."""

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

    def digest(self) -> str:
        """Return a string that differs where images, labels or classes do."""
        parts = (self.train.pixels, self.train.labels, self.test.pixels, self.test.labels)
        sums = [
            f"{tuple(part.shape)} {zlib.crc32(part.contiguous().numpy().data):08x}"
            for part in parts
        ]
        return f"{self.num_classes} classes, {', '.join(sums)}"

    def to(self, device: torch.device) -> DataSet:
        return DataSet(self.train.to(device), self.test.to(device), self.num_classes)


def load(config: Config) -> DataSet:
    """Read the data set that `config` names into the CPU's memory.

    Raises TrainingError, which names the folder or the file, where it is missing or broken.
    """
    if config.dataset == "digits":
        found = digits()
    elif config.data_dir is None:
        raise TrainingError(f"--dataset {config.dataset} needs --data-dir")
    elif config.dataset == "cifar10":
        found = cifar10(Path(config.data_dir), download=config.download)
    else:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "czm-fused")
        found = image_folder(Path(config.data_dir), Path(config.cache_dir or user))
    return hold_out(found, config.hold_out) if config.hold_out else found


def hold_out(whole: DataSet, images: int) -> DataSet:
    """Return the training images of `whole` alone, `images` of them, always the same, as test."""
    count = len(whole.train)
    if images >= count:
        raise TrainingError(f"--hold-out must be less than {count} images, but was {images}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train, test = whole.train.at(order[images:]), whole.train.at(order[:images])
    return DataSet(train, test, whole.num_classes)


def digits() -> DataSet:
    """Return scikit-learn's bundled handwritten digits: 8x8, one channel, values 0 to 16.

    The first half trains (898 images), the second tests (899, by other writers).
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = torch.from_numpy(bundle.images).to(torch.uint8).unsqueeze(1)
    images = Images(pixels, torch.from_numpy(bundle.target).long())
    train, test = torch.arange(len(images)).tensor_split([len(images) // 2])
    return DataSet(images.at(train), images.at(test), num_classes=10)


def cifar10(folder: Path, *, download: bool) -> DataSet:
    """Return CIFAR-10 as torchvision stores it in `folder`."""
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> Images:
        remedy = "try again" if download else "use --download to fetch it"
        with explained(f"no CIFAR-10 under --data-dir {folder}", remedy):
            source = CIFAR10(str(folder), train=train, download=download)
        pixels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(source.targets))

    return DataSet(train=part(True), test=part(False), num_classes=10)


def image_folder(folder: Path, cache: Path | None = None) -> DataSet:
    """Return the images of `folder`/train/<class>/ and `folder`/test/<class>/, as RGB of one size.

    `val` or `validation` may take the place of `test`. `cache` is the folder where the decoded
    images are kept; None keeps none.
    """
    if folder.name in ("train", *TEST_FOLDERS) and not (folder / "train").exists():
        raise TrainingError(
            f"--data-dir must hold train/ and test/, but seems to be one: give {folder.parent}"
        )
    test_name = next((name for name in TEST_FOLDERS if (folder / name).is_dir()), "test")
    parts = [folder / "train", folder / test_name]
    with explained("--data-dir needs train/ and test/ (or val/), with a folder a class"):
        classes = [sorted(each.name for each in part.iterdir() if each.is_dir()) for part in parts]
    if classes[0] != classes[1]:
        raise TrainingError(
            f"train/ and {test_name}/ under {folder} have different classes: only one of them has "
            f"{', '.join(sorted(set(classes[0]) ^ set(classes[1])))}"
        )
    train, test = (_read_part(part, classes[0], cache) for part in parts)
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise TrainingError(f"train/ and {test_name}/ under {folder} differ in image size")
    return DataSet(train, test, num_classes=len(classes[0]))


def _read_part(folder: Path, classes: Sequence[str], cache: Path | None) -> Images:
    files: dict[str, os.stat_result] = {}
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_image_files(folder / name, ()))
        if not found:
            raise TrainingError(f"no images under {folder / name}: remove the folder or fill it")
        files.update(found)
        labels += [label] * len(found)
    if not files:
        raise TrainingError(f"no images under {folder}: it needs a folder a class")
    if cache is None:
        return Images(_decode_all(list(files)), torch.tensor(labels))
    kept = cache / _cache_name(folder, files)
    try:
        pixels = torch.from_numpy(np.load(kept, mmap_mode="c"))
    except (OSError, ValueError):
        pixels = _decode_all(list(files))
        _keep(kept, pixels)
    return Images(pixels, torch.tensor(labels))


def _image_files(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every image file under `folder`, through symbolic links that do not lead back."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _image_files(Path(entry.path), (*above, here))
        elif entry.name.lower().endswith(EXTENSIONS):
            if not stat.S_ISREG(entry.stat().st_mode):
                raise TrainingError(f"{entry.path} must be a file, but is a device or pipe")
            yield entry.path, entry.stat()


def _cache_name(folder: Path, files: Mapping[str, os.stat_result]) -> str:
    """Return a name that changes with the names, sizes and times of the files of a folder."""
    content = [(path[len(str(folder)) :], s.st_size, s.st_mtime_ns) for path, s in files.items()]
    texts = os.path.realpath(folder), repr((_CACHE_VERSION, content))
    digests = (hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16] for text in texts)
    return "-".join(digests) + ".npy"


def _keep(file: Path, pixels: Tensor) -> None:
    """Keep `pixels` in the place of those of older contents of the folder, if the disk lets us."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as draft:
            np.save(draft, pixels.numpy())
        for old in file.parent.glob(f"{file.name.partition('-')[0]}-*.npy"):
            if old != file:
                old.unlink()
    except OSError as error:
        print(
            f"czm-train: warning: decoded images are not kept in {file.parent} ({error}): choose "
            "another --cache-dir to start faster",
            file=sys.stderr,
        )


def _decode_all(paths: Sequence[str]) -> Tensor:
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

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(decode_into_place, range(len(paths)))
        for _ in tqdm(done, "decoding", len(paths), unit="img", disable=None, leave=False):
            pass
    return pixels


def _decode(path: str) -> Tensor:
    from PIL import Image

    with explained(f"cannot read the image {path}"), Image.open(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels (mode {image.mode}) have no fixed range: save 8 bits")
        if image.mode.startswith("I;16"):
            # convert() would clip at 255; the upper byte is what Pillow takes of 16-bit colour.
            pixels = np.stack([(np.asarray(image) >> 8).astype(np.uint8)] * 3, axis=2)
        else:
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
