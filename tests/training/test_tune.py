import json
import shlex
import shutil

import numpy as np
import optuna
import pytest
from quick_runs import png, read_metrics

from czm_fused.training.__main__ import main
from czm_fused.training.cli import CommandLine, parse
from czm_fused.training.trainer import Trainer

OPTIONS = ["--depth", "8", "--epochs", "2", "--batch-size", "150", "--device", "cpu"]


def test_tune_prints_the_command_of_the_best_trial(tmp_path, capsys):
    command = ["tune", "--folder", str(tmp_path / "tune"), *OPTIONS]
    assert main([*command, "--trials", "3"]) == 0
    out = capsys.readouterr().out
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'tune/tune.db'}")
    assert len(study.trials) == 3
    best = study.best_trial
    assert set(best.params) == {"lr", "head_lr", "zmg", "gain", "noise"}
    words = shlex.split(out.splitlines()[-1])
    assert words[0] == "czm-train"
    printed = parse(CommandLine, words[1:])
    assert (printed.hold_out, printed.depth, printed.epochs) == (0, 8, 2)
    for name, value in best.params.items():
        assert getattr(printed, name) == float(f"{value:.3g}")
    summary = json.loads((tmp_path / f"tune/trial-{best.number}/summary.json").read_text())
    assert summary["test_accuracy"] == best.value
    assert summary["hold_out"] == 30  # a tenth of the 300 training images

    assert main([*command, "--trials", "4"]) == 0
    assert len(study.trials) == 4


def test_tune_searches_only_options_that_the_method_has(tmp_path, capsys):
    folder = tmp_path / "tune"
    options = [*OPTIONS, "--method", "bn", "--epochs", "1"]
    assert main(["tune", "--folder", str(folder), *options, "--trials", "1"]) == 0
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'tune.db'}")
    assert set(study.trials[0].params) == {"lr", "noise"}


def test_tune_takes_the_place_of_the_noise_that_it_searches(tmp_path, capsys):
    command = ["tune", "--folder", str(tmp_path), *OPTIONS, "--method", "bn", "--epochs", "1"]
    assert main([*command, "--noise-on", "branch", "--trials", "1"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert parse(CommandLine, words[1:]).checked().noise_on == "branch"


def test_trial_below_the_median_is_pruned(tmp_path, capsys, monkeypatch):
    tests = Trainer.test
    begun = []

    def test(self):
        loss, _, images = tests(self)
        begun.append(self.epoch)
        # The sixth trial, the first that may be pruned, is worse than all before it.
        return loss, (10.0 if begun.count(1) == 6 else 50.0), images

    monkeypatch.setattr(Trainer, "test", test)
    folder = tmp_path / "tune"
    assert main(["tune", "--folder", str(folder), *OPTIONS, "--trials", "6"]) == 0
    out = capsys.readouterr().out
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'tune.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert "pruned after epoch 1" in out and "best of 5 complete trials (6 begun)" in out
    assert len(read_metrics(folder / "trial-5")) == 1
    assert not (folder / "trial-5" / "summary.json").exists()


def test_interrupted_trial_goes_on_in_its_folder(tmp_path, capsys, monkeypatch):
    steps = iter(range(100))
    whole_step = Trainer._train_step

    def step(self, pixels, labels):
        if next(steps) == 3:  # of two steps an epoch: in the second
            raise KeyboardInterrupt
        return whole_step(self, pixels, labels)

    folder = tmp_path / "tune"
    command = ["tune", "--folder", str(folder), *OPTIONS, "--trials", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        assert main(command) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "trial 0:" in out and "epoch 2/2" in out and "epoch 1/2" not in out
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'tune.db'}")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert study.trials[0].params == study.trials[1].params
    assert {path.name for path in folder.iterdir()} == {"trial-0", "tune.db"}


@pytest.mark.parametrize("given", [["--zmg", "0.9"], ["--lr", "0.3"], ["--out", "foo"]])
def test_tune_refuses_what_it_sets(tmp_path, capsys, given):
    assert main(["tune", "--folder", str(tmp_path / "tune"), *OPTIONS, *given]) != 0
    assert f"{given[0]} is set by the search" in capsys.readouterr().err
    assert not (tmp_path / "tune").exists()


def test_a_study_that_was_refused_has_not_begun(tmp_path, capsys):
    command = ["tune", "--folder", str(tmp_path / "tune"), *OPTIONS, "--trials", "1"]
    assert main([*command, "--hold-out", "300"]) != 0
    assert "must be less than 300 images" in capsys.readouterr().err
    assert main([*command, "--hold-out", "100"]) == 0


def test_a_study_keeps_its_images(tmp_path, capsys, image_tree):
    other = shutil.copytree(image_tree, tmp_path / "other")
    (other / "train" / "cat" / "0.png").write_bytes(png(np.zeros((5, 6, 3))))
    command = ["tune", "--folder", str(tmp_path / "tune"), *OPTIONS, "--dataset", "imagefolder"]
    command += ["--hold-out", "2", "--trials", "1", "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, "--data-dir", str(image_tree)]) == 0
    assert main([*command, "--data-dir", str(other)]) != 0
    assert "was begun with other images" in capsys.readouterr().err
