"""A run that dies and is resumed ends like one that never died, bit for bit."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from quick_runs import QUICK, assert_same, png, read_metrics, trained_state, without_times

from czm_fused.training import checkpoint
from czm_fused.training.__main__ import main
from czm_fused.training.trainer import Trainer

STEPS_AN_EPOCH = 2


def interrupt_at(monkeypatch, step_to_die_in):
    """Let Ctrl-C arrive in the middle of a training step, counted from 0 over all epochs."""
    whole_step = Trainer._train_step
    steps = iter(range(step_to_die_in + 1))

    def step(self, pixels, labels):
        result = whole_step(self, pixels, labels)
        if next(steps) == step_to_die_in:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Trainer, "_train_step", step)


CENTERED = ["--residual-bias", "--center-every", "2", "--grad-norm", "0.1", "--bias-lr", "0.01"]


@pytest.mark.parametrize(
    ("method", "epochs_done", "more"),
    [
        ("czmig", 0, []),
        ("czmig", 2, []),
        ("czmig", 3, []),
        ("czmig", 2, CENTERED),
        ("bn", 2, []),
    ],
)
def test_resume_equals_uninterrupted(train, tmp_path, monkeypatch, method, epochs_done, more):
    options = ["--method", method, "--noise", "0.2", "--flip", "--milestones", "1", "3", *more]
    assert train(*options, out=tmp_path / "whole")[0] == 0

    with monkeypatch.context() as patch:
        interrupt_at(patch, epochs_done * STEPS_AN_EPOCH + 1)
        status, _, err = train(*options)
    assert status == 130
    assert err.count("\n") == 1
    assert f"czm-train --resume {tmp_path / 'run'}" in err
    assert checkpoint.load(tmp_path / "run")["trainer"]["epoch"] == epochs_done
    assert not (tmp_path / "run" / "summary.json").exists()

    torch.manual_seed(1234)  # whatever the new process's generator holds
    assert train("--resume", tmp_path / "run", quick=[])[0] == 0
    assert_same(trained_state(tmp_path / "run"), trained_state(tmp_path / "whole"))
    assert without_times(read_metrics(tmp_path / "run")) == without_times(
        read_metrics(tmp_path / "whole")
    )


def test_resume_cuts_metrics_to_the_checkpoint(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2 * STEPS_AN_EPOCH)
        train()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lr": 7}\n{"epo')
    assert train("--resume")[0] == 0
    records = read_metrics(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert records[2]["lr"] != 7


def test_resume_of_a_complete_run_trains_no_more(train, tmp_path):
    assert train()[0] == 0
    before = trained_state(tmp_path / "run")
    status, out, _ = train("--resume")
    assert status == 0
    assert "epoch 4/4" not in out
    assert_same(trained_state(tmp_path / "run"), before)
    assert (tmp_path / "run" / "summary.json").exists()


def test_resume_may_train_longer(train, tmp_path):
    assert train("--milestones", "2")[0] == 0
    assert train("--resume", "--epochs", "6", quick=[])[0] == 0
    assert [record["epoch"] for record in read_metrics(tmp_path / "run")] == list(range(1, 7))


def test_resume_into_another_folder_leaves_the_first(train, tmp_path):
    assert train()[0] == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    longer = ["--resume", tmp_path / "run" / "checkpoint.pt", "--epochs", "5"]
    assert train(*longer, out=tmp_path / "longer", quick=[])[0] == 0
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert len(read_metrics(tmp_path / "longer")) == 5


@pytest.mark.parametrize("death", [signal.SIGINT, signal.SIGKILL])
def test_process_killed_at_some_moment_leaves_a_resumable_checkpoint(tmp_path, death):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "czm_fused.training", *QUICK]
    command += ["--epochs", "1000", "--milestones", "4", "--out", str(folder)]
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and that is inherited.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = folder / "metrics.jsonl"
    try:
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(death)
        err = process.communicate(timeout=600)[1]
    finally:
        process.kill()
    if death == signal.SIGINT:
        assert process.returncode == 130
        assert f"czm-train --resume {folder}" in err
    assert not (folder / "summary.json").exists()
    epochs = checkpoint.load(folder)["trainer"]["epoch"] + 1
    # In a process of its own again, which has all digits.
    subprocess.run([*command[:3], "--resume", folder, "--epochs", str(epochs)], check=True)
    assert len(read_metrics(folder)) == epochs


def test_resume_writes_over_nothing_that_it_does_not_continue(train, tmp_path, capsys):
    assert train("--epochs", "1")[0] == 0
    checkpoint_of_run = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for others, message in ({"summary.json": b"mine"}, "holds other files"), (
        {"checkpoint.pt": checkpoint_of_run},
        "holds a run",
    ):
        folder = tmp_path / message
        folder.mkdir()
        for name, content in {**others, "kept.pt": checkpoint_of_run}.items():
            (folder / name).write_bytes(content)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        status = main(["--resume", str(folder / "kept.pt"), "--epochs", "2"])
        assert status != 0 and message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    out = ["--out", str(tmp_path / "new")]
    assert main(["--resume", str(folder / "kept.pt"), "--epochs", "2", *out]) == 0


def test_resume_refuses_other_images(train, tmp_path, image_tree):
    folder = ["--dataset", "imagefolder", "--cache-dir", tmp_path / "cache"]
    assert train(*folder, "--data-dir", image_tree, "--epochs", "1")[0] == 0
    other = shutil.copytree(image_tree, tmp_path / "other")
    resume = ["--resume", tmp_path / "run", "--epochs", "2"]
    assert train(*resume, "--data-dir", other, quick=[])[0] == 0
    (other / "train" / "cat" / "0.png").write_bytes(png(np.zeros((5, 6, 3))))
    status, _, err = train(*resume, "--epochs", "3", "--data-dir", other, quick=[])
    assert status != 0 and "trained on other images than there are now" in err


def test_drafts_of_killed_processes_go(train, tmp_path):
    assert train("--epochs", "1")[0] == 0
    draft = tmp_path / "run" / "checkpoint.pt.1.tmp"
    draft.write_bytes(b"half")
    assert train("--resume", tmp_path / "run", "--epochs", "2", quick=[])[0] == 0
    assert not draft.exists()
