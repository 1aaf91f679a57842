"""From the uint8 pixels of a batch to the input of the network, on the device of the pixels."""

# torch is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Normalisation:
    """Shift and scale every channel to zero mean and unit deviation over `pixels`.

    Args:
        pixels: uint8, `(images, channels, height, width)`, usually the whole training set.
    """

    def __init__(self, pixels: Tensor) -> None:
        # A histogram holds the exact moments without a float copy of the data set. Parts of some
        # MiB keep the int64 copies that bincount makes small.
        parts = pixels.split(max(1, 2**22 // max(1, pixels[0].numel())))
        counts = torch.stack(
            [
                torch.stack([torch.bincount(c.flatten(), minlength=256) for c in part.unbind(1)])
                for part in parts
            ]
        ).sum(0, dtype=torch.float64)
        values = torch.arange(256, dtype=torch.float64, device=pixels.device)
        weights = counts / counts.sum(dim=1, keepdim=True)
        mean = weights @ values
        std = (weights @ values.square() - mean.square()).clamp(min=0).sqrt()
        std = torch.where(std > 0, std, 1.0)
        self.mean = mean.float()[:, None, None]
        self.std = std.float()[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 images, `(images, channels, height, width)`."""
        return (pixels.float() - self.mean) / self.std


class Augmentation:
    """Random crops of the zero-padded images, mirrored or not, drawn for each image on its own.

    Args:
        crop_padding: zero pixels added on every side before the crop; 0 leaves images in place.
        flip: True mirrors half of the images left to right.
        generator: source of the draws, on the device of the images.
    """

    def __init__(self, crop_padding: int, flip: bool, generator: torch.Generator) -> None:
        self.crop_padding = crop_padding
        self.flip = flip
        self.generator = generator

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return augmented copies of `pixels`, `(images, channels, height, width)` of any dtype."""
        if self.crop_padding:
            rows, columns = self._draw(2 * self.crop_padding + 1, (2, len(pixels)), pixels.device)
            pixels = crop(pixels, self.crop_padding, rows, columns)
        if self.flip:
            mirrored = self._draw(2, (len(pixels),), pixels.device).bool()
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        return pixels

    def _draw(self, high: int, size: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.randint(high, size, device=device, generator=self.generator)


def crop(pixels: Tensor, padding: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Pad each image with zeros and cut its own size out of it again.

    Args:
        pixels: `(images, channels, height, width)`.
        padding: zero pixels on every side.
        rows: first row of each cut in the padded image, int64 in [0, 2 * padding], `(images,)`.
        columns: the same for the columns.
    """
    height, width = pixels.shape[2:]
    windows = F.pad(pixels, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    images = torch.arange(len(pixels), device=pixels.device)
    return windows[images, :, rows, columns]
