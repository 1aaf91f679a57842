import pytest
import torch
from torchvision.transforms import functional as tv

from czm_fused.training.batches import Normalisation, augment, crop


def images(count, channels=3, height=6, width=5):
    generator = torch.Generator().manual_seed(0)
    size = (count, channels, height, width)
    return torch.randint(1, 256, size, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_equals_torchvision(padding):
    places = [(row, column) for row in range(2 * padding + 1) for column in range(2 * padding + 1)]
    rows, columns = torch.tensor(places).T
    pixels = images(len(places))
    expected = [
        tv.crop(tv.pad(image, padding), row, column, 6, 5)
        for image, (row, column) in zip(pixels, places, strict=True)
    ]
    assert torch.equal(crop(pixels, padding, rows, columns), torch.stack(expected))


def test_augmentation_is_a_crop_and_a_flip_of_each_image_on_its_own():
    padding = 1
    pixels = images(400)
    augmented = augment(pixels, padding, True, torch.Generator().manual_seed(1))
    assert augmented.dtype == torch.uint8
    seen = set()
    for image, result in zip(pixels, augmented, strict=True):
        padded = tv.pad(image, padding)
        variants = {}
        for row in range(3):
            for column in range(3):
                cut = tv.crop(padded, row, column, 6, 5)
                variants[row, column, False] = cut
                variants[row, column, True] = tv.hflip(cut)
        matches = [key for key, variant in variants.items() if torch.equal(variant, result)]
        assert len(matches) == 1
        seen.update(matches)
    # 400 draws miss one of 18 equally likely variants with probability 18 * (17/18)**400 < 1e-8.
    assert len(seen) == 18


def test_augmentation_draws_from_its_generator_alone():
    pixels = images(50)
    state = torch.get_rng_state()
    first, again, other = (
        augment(pixels, 4, True, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_without_crop_and_flip_changes_nothing():
    pixels = images(5)
    assert torch.equal(augment(pixels, 0, False, torch.Generator()), pixels)


def test_normalisation_gives_every_channel_zero_mean_and_unit_deviation():
    pixels = images(200)
    expected = tv.normalize(
        pixels.double(),
        pixels.double().mean(dim=(0, 2, 3)).tolist(),
        pixels.double().std(dim=(0, 2, 3), unbiased=False).tolist(),
    )
    actual = Normalisation(pixels)(pixels)
    assert actual.dtype == torch.float32
    # The pixel is exact; mean, deviation, difference and quotient round once each, and the
    # difference carries the rounding of a mean of up to 2**8 into values of at least 1/75.
    tolerance = 2**-24 * (2**8 / 75 + 4 * expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_normalisation_of_a_constant_channel_is_zero():
    pixels = torch.full((4, 1, 3, 3), 7, dtype=torch.uint8)
    assert not Normalisation(pixels)(pixels).any()
