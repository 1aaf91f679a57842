import numpy as np
import pytest
import torch
from quick_runs import png
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from czm_fused.training import Config, data
from czm_fused.training.errors import TrainingError


@pytest.fixture(autouse=True)
def few_digits():
    """Leave the data sets whole."""


def test_digits_are_scikit_learns_first_half_and_second_half():
    bundle = load_digits()
    digits = data.digits()
    assert (len(digits.train), len(digits.test), digits.num_classes) == (898, 899, 10)
    assert digits.train.pixels.dtype == torch.uint8
    assert digits.train.pixels.shape[1:] == (1, 8, 8)
    pixels = torch.cat([digits.train.pixels, digits.test.pixels])[:, 0].numpy()
    assert np.array_equal(pixels, bundle.images)
    assert np.array_equal(torch.cat([digits.train.labels, digits.test.labels]), bundle.target)


def test_image_folder_decodes_what_torchvision_reads(image_tree):
    found = data.image_folder(image_tree)
    assert found.num_classes == 2
    for part, images in (("train", found.train), ("test", found.test)):
        expected = ImageFolder(str(image_tree / part))
        assert len(images) == len(expected)
        for pixels, label, (image, target) in zip(
            images.pixels, images.labels, expected, strict=True
        ):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
            assert label == target


def test_hold_out_parts_the_training_images():
    digits = data.digits()
    first, again = (data.hold_out(digits, 100) for _ in range(2))
    assert (len(first.train), len(first.test), first.num_classes) == (798, 100, 10)
    assert torch.equal(first.test.pixels, again.test.pixels)

    def rows(*parts):
        return sorted(
            [*pixels.flatten().tolist(), int(label)]
            for part in parts
            for pixels, label in zip(part.pixels, part.labels, strict=True)
        )

    assert rows(first.train, first.test) == rows(digits.train)
    with pytest.raises(TrainingError, match="--hold-out must be less than 898 images, but was 898"):
        data.hold_out(digits, 898)


def test_load_holds_out_what_the_settings_say():
    assert len(data.load(Config(hold_out=10)).test) == 10
    assert len(data.load(Config()).test) == 899


def test_image_folder_makes_grey_images_rgb(image_tree):
    grey = np.arange(30).reshape(5, 6)
    (image_tree / "train" / "cat" / "0.png").write_bytes(png(grey))
    pixels = data.image_folder(image_tree).train.pixels[0]
    assert all(np.array_equal(channel, grey) for channel in pixels)


def remove_test_folder(tree):
    for file in sorted((tree / "test").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (tree / "test").rmdir()


def empty_a_class(tree):
    for file in (tree / "train" / "dog").iterdir():
        file.unlink()


def rename_a_class(tree):
    (tree / "test" / "dog").rename(tree / "test" / "wolf")


def break_an_image(tree):
    (tree / "train" / "dog" / "1.png").write_bytes(b"no image")


def truncate_an_image(tree):
    file = tree / "test" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])


def enlarge_an_image(tree):
    (tree / "train" / "dog" / "2.png").write_bytes(png(np.zeros((5, 7, 3))))


BROKEN_TREES = [
    (remove_test_folder, ["images", "test/"]),
    (empty_a_class, ["train", "dog"]),
    (rename_a_class, ["dog", "wolf"]),
    (break_an_image, ["train", "dog", "1.png"]),
    (truncate_an_image, ["test", "cat", "1.png"]),
    (enlarge_an_image, ["2.png", "7x5", "6x5"]),
]


@pytest.mark.parametrize(("damage", "named"), BROKEN_TREES)
def test_image_folder_names_what_is_wrong(image_tree, damage, named):
    damage(image_tree)
    with pytest.raises(TrainingError) as caught:
        data.image_folder(image_tree)
    assert all(word in str(caught.value) for word in named)


def test_image_folder_that_is_missing_or_empty(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(TrainingError, match=folder.name):
            data.image_folder(folder)


def test_cifar10_that_is_missing(tmp_path):
    with pytest.raises(TrainingError, match="no CIFAR-10 under .*: use --download"):
        data.cifar10(tmp_path / "nowhere", download=False)
    with pytest.raises(TrainingError, match="no CIFAR-10 under .*: use --download"):
        data.cifar10(tmp_path, download=False)
