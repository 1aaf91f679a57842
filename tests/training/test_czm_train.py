import copy
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from quick_runs import assert_same, read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from czm_fused.training import checkpoint, plots
from czm_fused.training.trainer import Trainer

METRICS = {
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "filter_norms",
    "collapsed_filters",
    "rejection_db",
    "images_per_second",
    "seconds",
}


@pytest.mark.parametrize("method", ["czmig", "czmi", "bn", "plain"])
def test_run_leaves_metrics_summary_and_pictures(train, tmp_path, method):
    status, out, err = train("--method", method, "--seed", "5", "--milestones", "3")
    assert status == 0
    folder = tmp_path / "run"
    records = read_metrics(folder)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record.keys() == METRICS
        assert 0 <= record["test_accuracy"] <= 100
        norms = list(record["filter_norms"].values())
        assert norms == sorted(norms)

    summary = json.loads((folder / "summary.json").read_text())
    expected = {"method": method, "depth": 8, "dataset": "digits", "seed": 5, "epochs": 4}
    assert {name: summary[name] for name in expected} == expected
    assert {"lr", "zmg", "noise", "seconds"} <= summary.keys()
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    rates = [record["lr"] for record in records]
    assert rates == pytest.approx([summary["lr"]] * 3 + [summary["lr"] / 10], rel=1e-12)

    for name in ("accuracy.png", "filters.png"):
        with Image.open(folder / name) as image:
            image.load()
    assert f"{summary['test_accuracy']:.2f} % test accuracy in the final epoch" in out
    assert checkpoint.load(folder)["config"]["method"] == method
    assert not list(folder.glob("*.tmp"))


def test_run_is_not_complete_before_its_pictures(train, tmp_path, monkeypatch):
    def draw_run(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(plots, "draw_run", draw_run)
    assert train()[0] == 2
    assert not (tmp_path / "run" / "summary.json").exists()


def test_run_reports_the_final_epoch_and_never_the_best(train, tmp_path, monkeypatch):
    accuracies = iter([20.0, 90.0, 30.0, 10.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: (1.0, next(accuracies), 100))
    _, out, _ = train()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] == 10.0
    assert "10.00 % test accuracy" in out


def test_run_writes_tensorboard_events(train, tmp_path):
    train()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name in ("train/loss", "test/accuracy", "lr", "filter_norms/p50"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
    expected = [record["test_accuracy"] for record in read_metrics(tmp_path / "run")]
    actual = [event.value for event in events.Scalars("test/accuracy")]
    assert actual == pytest.approx(expected, rel=2**-23)  # events hold float32


def test_run_is_determined_by_its_seed(train, tmp_path):
    weights = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train("--seed", seed, out=tmp_path / out)[0] == 0
        weights.append(checkpoint.load(tmp_path / out)["trainer"]["model"]["stem.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_run_learns_the_digits_it_trains_on(train, tmp_path):
    options = ["--epochs", "15", "--batch-size", "32", "--crop-padding", "0", "--noise", "0"]
    assert train(*options)[0] == 0
    records = read_metrics(tmp_path / "run")
    assert records[-1]["train_accuracy"] > 90
    assert records[-1]["filter_norms"]["min"] > 0.1


def test_run_on_an_image_folder(train, tmp_path, image_tree):
    options = ["--dataset", "imagefolder", "--data-dir", image_tree, "--batch-size", "4"]
    status, _, err = train(*options)
    assert status == 0, err
    state = checkpoint.load(tmp_path / "run")["trainer"]["model"]
    assert state["stem.weight"].shape[1] == 3
    assert state["classifier.weight"].shape[0] == 2


def test_head_and_anchor_settings_reach_the_optimizer(tmp_path):
    from czm_fused.training import Config, data

    config = Config(**{"depth": 8, "lr": 0.3, "head_lr": 0.05, "zmg": 0.5, "luma": 1e-3})
    trainer = Trainer(config, data.digits(), torch.device("cpu"))
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {name: (g["lr"], g["zmg"], g["luma"], g["exp_scale"]) for name, g in groups.items()} == {
        "stem": (0.3, 0.0, 1e-3, True),
        "spatial": (0.3, 0.5, 1e-3, True),
        "rest": (0.05, 0.0, 1e-3, False),
    }
    assert trainer.lr == 0.3


@pytest.mark.parametrize(
    ("stem", "zmg", "luma", "exp_scale"),
    [("scaled", 0.0, 1e-3, True), ("zero-mean", 0.5, 1e-3, True), ("plain", 0.0, 0.0, False)],
)
def test_stem_and_gain_reach_network_and_optimizer(stem, zmg, luma, exp_scale):
    from czm_fused.training import Config, data

    config = Config(**{"depth": 8, "zmg": 0.5, "luma": 1e-3, "stem": stem, "gain": 1.3})
    trainer = Trainer(config, data.digits(), torch.device("cpu"))
    group = trainer.optimizer.param_groups[0]
    assert (group["name"], group["zmg"], group["luma"]) == ("stem", zmg, luma)
    assert group["exp_scale"] == exp_scale
    weight = trainer.model.stem.weight.detach()
    # A mean of 9 float32 numbers below 1.3: 9 roundings of 2**-24 each.
    is_zero_mean = weight.mean(dim=(2, 3)).abs().max() <= 9 * 2**-24 * 1.3
    assert is_zero_mean == (stem == "zero-mean")
    for parameter in trainer.model.parameters():
        if parameter.dim() == 4:
            # Norms of up to 576 numbers, scaled twice.
            norms = parameter.detach().flatten(1).norm(dim=1)
            assert torch.allclose(norms, torch.tensor(1.3), rtol=(576 + 3) * 2**-24)


def test_cosine_ends_near_zero(train, tmp_path):
    status, _, err = train("--schedule", "cosine", "--epochs", "3")
    assert status == 0, err
    history = checkpoint.load(tmp_path / "run")["history"]
    assert [each["lr"] for each in history] == pytest.approx([0.4, 0.3, 0.1])


@pytest.mark.parametrize(
    ("size", "last_batch", "sizes"),
    [
        (128, "join", [128, 172]),
        (128, "keep", [128, 128, 44]),
        (120, "join", [120, 120, 60]),
        (500, "join", [300]),
    ],
)
def test_every_training_image_is_seen_once_an_epoch(monkeypatch, size, last_batch, sizes):
    from czm_fused.training import Config, data

    values = {"depth": 8, "batch_size": size, "last_batch": last_batch, "crop_padding": 0}
    config = Config(**values)
    digits = data.digits()
    trainer = Trainer(config, digits, torch.device("cpu"))
    seen = []

    def look(self, pixels, labels):
        seen.append(pixels)
        return torch.tensor([len(labels)] * 3, dtype=torch.float64)

    monkeypatch.setattr(Trainer, "_train_step", look)
    assert trainer.train_epoch() == (1.0, 100.0, 300)
    assert [len(pixels) for pixels in seen] == sizes
    rows = torch.cat(seen).flatten(1).tolist()
    assert sorted(rows) == sorted(digits.train.pixels.flatten(1).tolist())
    assert rows != digits.train.pixels.flatten(1).tolist()


@pytest.mark.parametrize("method", ["czmig", "bn"])
def test_testing_draws_nothing_and_changes_nothing(method):
    from czm_fused.training import Config, data

    config = Config(**{"depth": 8, "method": method, "noise": 0.3})
    trainer = Trainer(config, data.digits(), torch.device("cpu"))
    before = copy.deepcopy(trainer.state_dict())
    assert trainer.test() == trainer.test()
    assert_same(trainer.state_dict(), before)


def fails(train, tmp_path, *options, **keywords):
    """Run a command that must fail before it writes anything; return its one line."""
    status, out, err = train(*options, **keywords)
    assert (status, out) == (2, "")
    assert err.startswith("czm-train: error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    return err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--depth", "21"], ["--depth", "21", "nearest is 20"]),
        (["--dataset", "imagefolder"], ["--data-dir"]),
        (["--dataset", "imagefolder", "--data-dir", "/nowhere"], ["/nowhere"]),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], ["/nowhere", "--download"]),
        (["--device", "abacus"], ["--device abacus", "not available"]),
        (["--device", "meta"], ["--device meta", "not available"]),
        (["--backend", "cuda"], ["cuda"]),
        (["--lr", "-1"], ["lr", "-1"]),
        (["--lr", "nan"], ["--lr must be a finite number", "nan"]),
        (["--zmg", "1.5"], ["zmg", "1.5"]),
        (["--noise", "1"], ["noise", "1"]),
        (["--method", "bn", "--zmg", "0.5"], ["--zmg", "bn"]),
        (["--cuda-graph"], ["--cuda-graph needs --device cuda", "leave it out"]),
        (["--tf32"], ["--tf32 needs --device cuda", "leave it out"]),
        (["--resume"], ["no checkpoint", "--resume"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(train, tmp_path, options, words):
    err = fails(train, tmp_path, *options)
    assert all(word in err for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_bad_input(train, tmp_path):
    assert "--device cuda is not available" in fails(train, tmp_path, "--device", "cuda")


def test_broken_image_is_bad_input(train, tmp_path, image_tree):
    (image_tree / "test" / "dog" / "0.png").write_bytes(b"broken")
    err = fails(train, tmp_path, "--dataset", "imagefolder", "--data-dir", image_tree)
    assert os.path.join("dog", "0.png") in err


@pytest.mark.parametrize(
    "options", [["--depth", "x"], ["--method", "sgd"], ["--lr", "fast"], ["--dept", "8"]]
)
def test_malformed_option_is_one_line(train, tmp_path, options):
    err = fails(train, tmp_path, *options)
    assert options[0] in err and "see czm-train --help" in err
    assert ("did you mean --depth?" in err) == (options[0] == "--dept")


def test_only_misspelt_options_get_a_suggestion(train, tmp_path):
    good = ["--lr=0.2", "--batch_size=3", "--no-flip"]
    err = fails(train, tmp_path, *good, "--epoch=3", "--no-residual-bia")
    suggested = re.findall("did you mean (--[a-z-]+)", err)
    assert suggested == ["--epochs", "--residual-bias"]
    (tmp_path / "options.yaml").write_text("lr: 0.2\nhead_lr: 0.1\nepoch: 3\n")
    err = fails(train, tmp_path, "--config", tmp_path / "options.yaml")
    assert re.findall("did you mean (--[a-z-]+)", err) == ["--epochs"]


def test_run_does_not_replace_another_unasked(train, tmp_path):
    assert train()[0] == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    status, _, err = train("--seed", "1")
    assert status == 2
    assert "--resume" in err and "--overwrite" in err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert train("--seed", "1", "--overwrite")[0] == 0
    assert checkpoint.load(tmp_path / "run")["config"]["seed"] == 1
    assert len(list((tmp_path / "run").glob("events.*"))) == 1


def test_resume_refuses_a_checkpoint_that_does_not_fit(train, tmp_path):
    assert train("--epochs", "1")[0] == 0
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)

    for options in (["--depth", "14"], ["--method", "bn"], ["--lr", "0.2"]):
        status, _, err = train("--resume", *options, quick=[])
        assert status == 2
        assert options[0] in err

    state["config"]["depth"] = 14
    checkpoint.save(path, state)
    status, _, err = train("--resume", quick=[])
    assert status == 2
    assert "another network" in err and err.count("\n") == 1

    state["config"]["depth"] = 8
    state["trainer"]["device_type"] = "cuda"
    checkpoint.save(path, state)
    status, _, err = train("--resume", quick=[])
    assert status == 2
    assert "--device cuda" in err

    path.write_bytes(content[:-100])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    status, _, err = train("--resume", quick=[])
    assert status == 2
    assert "truncated" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("method", ["czmig", "bn"])
def test_diverging_run_stops_and_keeps_the_last_checkpoint(train, tmp_path, monkeypatch, method):
    whole_step = Trainer._train_step
    calls = iter(range(100))

    def step(self, pixels, labels):
        sums = whole_step(self, pixels, labels)
        return sums * math.nan if next(calls) == 3 else sums

    monkeypatch.setattr(Trainer, "_train_step", step)
    status, _, err = train("--method", method)
    assert status == 2
    assert err.count("\n") == 1
    assert "the loss became nan in epoch 2/4, step 2" in err
    assert "holds the run after epoch 1" in err
    assert checkpoint.load(tmp_path / "run")["trainer"]["epoch"] == 1
    assert len(read_metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("method", ["czmig", "bn", "plain"])
def test_absurd_learning_rate_diverges_with_a_message(train, method):
    status, _, err = train("--method", method, "--lr", "1e30")
    assert status == 2
    assert "the loss became" in err


def test_module_and_help():
    command = [sys.executable, "-m", "czm_fused.training", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    for name in ("method", "lr", "zmg", "luma", "noise", "epochs", "milestones", "resume", "out"):
        assert f"--{name}" in result.stdout
