"""Seeds trained together end as each would alone, bit for bit, and can be killed like one."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from quick_runs import QUICK, assert_same, read_metrics, trained_state, without_times

from czm_fused.training import checkpoint
from czm_fused.training.cli import parse
from czm_fused.training.errors import TrainingError
from czm_fused.training.loop import Trainer
from czm_fused.training.run import run_together

OPTIONS = [*QUICK, "--noise", "0.2", "--flip", "--milestones", "1", "3"]
TOGETHER = ["--seed", "3", "--parallel-seeds", "2"]


def train(*options):
    run_together(parse([*map(str, options)]).runs)


def assert_like_alone(folder, alone):
    assert_same(trained_state(folder), trained_state(alone))
    assert without_times(read_metrics(folder)) == without_times(read_metrics(alone))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["out"] == str(folder)


@pytest.fixture
def alone(tmp_path):
    """Train seeds 3 and 4 alone; return their folders."""
    folders = [tmp_path / f"alone{seed}" for seed in (3, 4)]
    for seed, folder in zip((3, 4), folders, strict=True):
        train(*OPTIONS, "--seed", seed, "--out", folder)
    return folders


def test_seeds_end_as_alone_even_after_a_kill(tmp_path, monkeypatch, alone):
    together = tmp_path / "together"
    train(*OPTIONS, *TOGETHER, "--out", together)
    for seed, folder in zip((3, 4), alone, strict=True):
        assert_like_alone(together / f"s{seed}", folder)

    # Killed between the two seeds' checkpoints of epoch 2, and before the first of a third seed.
    killed = tmp_path / "killed"
    whole_save = checkpoint.save
    calls = iter(range(100))

    def save(path, state):
        if next(calls) == 5:
            raise KeyboardInterrupt
        whole_save(path, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save)
        train(*OPTIONS, *TOGETHER, "--out", killed)
    epochs = [checkpoint.load(killed / name)["trainer"]["epoch"] for name in ("s3", "s4")]
    assert epochs == [2, 1]
    train("--resume", killed, *TOGETHER)
    for seed, folder in zip((3, 4), alone, strict=True):
        assert_like_alone(killed / f"s{seed}", folder)


def test_a_seed_that_never_began_begins_when_the_others_are_resumed(tmp_path, alone):
    together = tmp_path / "together"
    train(*OPTIONS, "--seed", "4", "--out", together / "s4", "--epochs", "4")
    train("--resume", together, *TOGETHER)
    assert_like_alone(together / "s3", alone[0])


def test_seeds_have_folders_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invocation = parse([*OPTIONS, *TOGETHER])
    folders = [settings.out for settings, _ in invocation.runs]
    assert folders == ["runs/digits-czmig-8/s3", "runs/digits-czmig-8/s4"]
    assert [settings.seed for settings, _ in invocation.runs] == [3, 4]
    assert invocation.to_resume == "--resume runs/digits-czmig-8 --seed 3 --parallel-seeds 2"
    invocation = parse([*OPTIONS, *TOGETHER, "--out", "here"])
    assert [settings.out for settings, _ in invocation.runs] == ["here/s3", "here/s4"]
    assert invocation.to_resume == "--resume here --seed 3 --parallel-seeds 2"


def test_bad_input(tmp_path):
    with pytest.raises(TrainingError, match="--parallel-seeds must be at least 1, but was 0"):
        parse(["--parallel-seeds", "0"])
    with pytest.raises(TrainingError, match="no checkpoint in .*s3 or its like"):
        parse(["--resume", str(tmp_path), *TOGETHER])
    with pytest.raises(TrainingError, match="give --resume their folder, and no --out"):
        parse(["--resume", str(tmp_path), "--out", str(tmp_path / "other"), *TOGETHER])
    train(*QUICK, "--epochs", "1", "--seed", "4", "--out", tmp_path / "s4")
    with pytest.raises(TrainingError, match="s4 holds a run"):
        parse([*QUICK, *TOGETHER, "--out", str(tmp_path)])


def test_a_seed_that_diverges_is_named(tmp_path, monkeypatch):
    whole_step = Trainer._train_step

    def step(self, pixels, labels):
        loss, hits = whole_step(self, pixels, labels)
        return loss * (float("nan") if self.settings.seed == 4 else 1), hits

    monkeypatch.setattr(Trainer, "_train_step", step)
    with pytest.raises(TrainingError, match="epoch 1/4, step 1, seed 4; .*hold the runs after"):
        train(*OPTIONS, *TOGETHER, "--out", tmp_path)


def test_process_killed_at_some_moment_is_resumed_bit_for_bit(tmp_path, image_tree):
    options = [*OPTIONS, "--dataset", "imagefolder", "--data-dir", str(image_tree)]
    options += ["--batch-size", "4", "--epochs", "40", *TOGETHER]
    train(*options, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    program = (
        "from czm_fused.training.cli import parse\n"
        "from czm_fused.training.run import run_together\n"
        f"run_together(parse({[*options, '--out', str(killed)]}).runs)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    metrics = killed / "s4" / "metrics.jsonl"
    try:
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(random.random())
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=600)
    finally:
        process.kill()
    train("--resume", killed, *TOGETHER)
    for name in ("s3", "s4"):
        assert_like_alone(killed / name, tmp_path / "whole" / name)
