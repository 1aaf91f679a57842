"""One short run of the benchmark of the training, and one of a training that is wrong."""

import pytest

SHORT = ["--depth", "8", "--batch", "8", "--steps", "4", "--workers", "0", "--seconds", "1e-6"]


@pytest.fixture
def training_throughput(benchmark_script):
    pytest.importorskip("torchvision")
    return benchmark_script("training_throughput")


def test_training_throughput_writes_rows(benchmark_script, training_throughput, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    options = ["--options", "float32", "channels_last+bfloat16"]
    assert training_throughput.main([*SHORT, *options, "--json", str(path)]) == 0

    rows = benchmark_script("common.rows")
    found = rows.read(path)
    names = [(row.provider, row.config["options"]) for row in found if row.metric == "step"]
    assert sorted(names) == sorted(
        (provider, speed)
        for provider in ("czm_train", "czm_train_bn", "pytorch")
        for speed in options[1:]
    )
    for provider, speed in names:
        metrics = ("step", "throughput", "200_epochs", "input", "speedup", "speedup_of_defaults")
        value = {
            metric: rows.value(found, provider=provider, options=speed, metric=metric)
            for metric in metrics
        }
        assert value["throughput"] == pytest.approx(8 / value["step"] * 1e6)
        assert value["200_epochs"] == pytest.approx(200 * 6250 * value["step"] / 1e6)
        assert value["input"] > 0
        plain = rows.value(found, provider="pytorch", options=speed, metric="step")
        assert value["speedup"] == pytest.approx(plain / value["step"])
        slow = rows.value(found, provider="pytorch", options="float32", metric="step")
        assert value["speedup_of_defaults"] == pytest.approx(slow / value["step"])
    assert "speedup" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"), [(0.0, "does not learn"), (2.0, "is not the training without options")]
)
def test_training_throughput_stops_at_a_wrong_training(
    training_throughput, tmp_path, capsys, monkeypatch, wrong, words
):
    training = training_throughput.CZMTraining
    epoch = training.epoch
    monkeypatch.setattr(
        training, "epoch", lambda self: epoch(self) * (wrong if self.speed.channels_last else 1)
    )
    path = tmp_path / "rows.jsonl"
    arguments = [*SHORT, "--options", "float32", "channels_last", "--json", str(path)]
    assert training_throughput.main(arguments) == 1
    err = capsys.readouterr().err
    assert "czm_train with channels_last" in err and words in err
    assert not path.exists()


def test_training_throughput_knows_its_options(training_throughput, capsys):
    with pytest.raises(SystemExit):
        training_throughput.main([*SHORT, "--options", "fast"])
    assert "choose from float32, channels_last, bfloat16" in capsys.readouterr().err
