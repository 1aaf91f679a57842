import numpy as np
import pytest
from quick_runs import QUICK, png

from czm_fused.training.__main__ import main


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
