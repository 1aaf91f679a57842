import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from czm_fused.training.__main__ import main

QUICK = ["--depth", "8", "--epochs", "4", "--device", "cpu", "--batch-size", "256"]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Train on 300 digits and test on 100, so that an epoch is two steps."""
    from czm_fused.training import data

    every_digit = data.digits

    def slice_of_digits():
        digits = every_digit()
        train = data.Images(digits.train.pixels[:300], digits.train.labels[:300])
        test = data.Images(digits.test.pixels[:100], digits.test.labels[:100])
        return data.DataSet(train, test, digits.num_classes)

    monkeypatch.setattr(data, "digits", slice_of_digits)


@pytest.fixture
def train(tmp_path, capsys):
    """Run `czm-train` on a quick net, by default into tmp_path/run; return (status, out, err)."""

    def run(*options, out=tmp_path / "run", quick=QUICK):
        status = main([*quick, "--out", str(out), *map(str, options)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def image_tree(tmp_path):
    """A folder of 3 training and 2 test images a class, 6x5 pixels, PNG; return its path."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(png(rng.integers(256, size=(5, 6, 3))))
    return tmp_path / "images"


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format="png")
    return file.getvalue()


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(records):
    return [
        {key: record[key] for key in record.keys() - {"seconds", "images_per_second"}}
        for record in records
    ]


def assert_same(actual, expected):
    """Assert that two nested structures of tensors and values are equal to the bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    else:
        assert actual == expected
