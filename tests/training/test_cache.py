"""Decoded images are kept, and decoded again exactly when the folder has changed."""

import os

import pytest
import torch
from quick_runs import png

from czm_fused.training import data


@pytest.fixture
def decoded(monkeypatch):
    """Return the paths of the images that are decoded."""
    paths = []
    real = data._decode
    monkeypatch.setattr(data, "_decode", lambda path: (paths.append(path), real(path))[1])
    return paths


def test_second_start_decodes_nothing(image_tree, tmp_path, decoded):
    first = data.image_folder(image_tree, cache=tmp_path / "cache")
    decoded.clear()
    second = data.image_folder(image_tree, cache=tmp_path / "cache")
    assert decoded == []
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.test.pixels, second.test.pixels)


def touch(folder):
    os.utime(folder / "0.png", ns=(1, 1))


def rename(folder):
    (folder / "0.png").rename(folder / "9.png")


def add(folder):
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())


@pytest.mark.parametrize("change", [touch, rename, add])
def test_changed_folder_is_decoded_again(image_tree, tmp_path, decoded, change):
    data.image_folder(image_tree, cache=tmp_path / "cache")
    change(image_tree / "train" / "cat")
    decoded.clear()
    found = data.image_folder(image_tree, cache=tmp_path / "cache")
    assert decoded
    assert torch.equal(found.train.pixels, data.image_folder(image_tree).train.pixels)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the old files are gone


def test_damaged_cache_is_replaced(image_tree, tmp_path):
    expected = data.image_folder(image_tree, cache=tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    found = data.image_folder(image_tree, cache=tmp_path / "cache")
    assert torch.equal(found.train.pixels, expected.train.pixels)


def test_unusable_cache_folder_is_one_warning(image_tree, tmp_path, capsys):
    (tmp_path / "file").write_bytes(png(torch.zeros(2, 2).numpy()))
    data.image_folder(image_tree, cache=tmp_path / "file" / "cache")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2  # of train and of test
    assert all("--cache-dir" in line for line in warnings)
