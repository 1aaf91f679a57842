import json
import shlex

import optuna

from czm_fused.training.__main__ import main
from czm_fused.training.cli import parse_options

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
    printed = parse_options(words[1:]).resolve()
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
