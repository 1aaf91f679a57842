"""One short run of the benchmark of the training, and one of a training that is wrong."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = ["--depth", "8", "--batch", "8", "--steps", "4", "--workers", "0", "--seconds", "1e-6"]

pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "training_throughput.py").exists(), reason="no benchmarks beside the tests"
)


@pytest.fixture
def training_throughput(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_throughput

    return training_throughput


def test_training_throughput_writes_rows(training_throughput, tmp_path, capsys):
    rows_file, details_file = tmp_path / "rows.json", tmp_path / "details.json"
    files = ["--json", str(rows_file), "--details", str(details_file)]
    options = ["--options", "float32", "channels_last+bfloat16"]
    assert training_throughput.main([*SHORT, *options, *files]) == 0

    rows = json.loads(rows_file.read_text())
    for row in rows:
        assert list(row) == [
            "model", "provider", "options", "device", "batch", "seeds", "workers",
            "p20_us", "p50_us", "p80_us", "images_per_second", "input_us", "input_share",
            "seconds_200_epochs", "speedup", "speedup_of_defaults",
        ]  # fmt: skip
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["images_per_second"] == pytest.approx(8 * row["seeds"] / row["p50_us"] * 1e6)
        assert row["seconds_200_epochs"] == pytest.approx(200 * 6250 * row["p50_us"] / 1e6)
    names = {(row["provider"], row["options"], row["seeds"]) for row in rows}
    assert names == {
        (provider, options, 1)
        for provider in ("czm_train", "czm_train_bn", "pytorch")
        for options in ("float32", "channels_last+bfloat16")
    }
    for row in rows:
        if row["provider"] == "pytorch":
            assert row["speedup"] == 1
    assert json.loads(details_file.read_text()).keys() == {"machine"}
    assert "x pytorch" in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "words"), [(0.0, "does not learn"), (2.0, "something else")])
def test_training_throughput_stops_at_a_wrong_training(
    training_throughput, tmp_path, capsys, monkeypatch, wrong, words
):
    from training.czm import CZMTraining

    epoch = CZMTraining.epoch
    monkeypatch.setattr(
        CZMTraining,
        "epoch",
        lambda self: epoch(self) * (wrong if self.options.channels_last else 1),
    )
    rows_file = tmp_path / "rows.json"
    arguments = [*SHORT, "--options", "float32", "channels_last", "--json", str(rows_file)]
    assert training_throughput.main(arguments) == 1
    err = capsys.readouterr().err
    assert "czm_train with channels_last" in err and words in err
    assert not rows_file.exists()


def test_training_throughput_knows_its_options(training_throughput, capsys):
    with pytest.raises(SystemExit):
        training_throughput.main([*SHORT, "--options", "fast"])
    assert "choose from float32, channels_last, bfloat16" in capsys.readouterr().err
