"""Several processes on one sweep, one of them killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from quick_runs import assert_same, read_metrics, trained_state

from czm_fused.training import checkpoint
from czm_fused.training.__main__ import main

BN, CZMIG = "bn-lr0.1", "czmig-lr0.4-zmg0.85-noise0.1"


@pytest.fixture
def command(image_tree):
    """Return the arguments of a sweep of tiny runs into a folder."""

    def arguments(out, epochs, *options):
        shared = ["--dataset", "imagefolder", "--data-dir", str(image_tree), "--batch-size", "4"]
        shared += ["--depth", "8", "--epochs", str(epochs), "--device", "cpu", "--workers", "1"]
        return ["table1", "--out", str(out), *shared, *options]

    return arguments


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "czm_fused.training", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs SIGSTOP and SIGKILL")
def test_killed_process_loses_its_run_to_another(command, tmp_path, capsys):
    epochs = 20
    options = ["--rows", CZMIG, "--seeds", "1"]
    run = tmp_path / "sweep" / CZMIG / "seed-0"
    process = start(command(tmp_path / "sweep", epochs, *options))
    try:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        held = checkpoint.load(run)["trainer"]["epoch"]
        assert held < epochs

        assert main(command(tmp_path / "sweep", epochs, *options)) == 0
        assert "left to the processes that train them: 1 of 1 runs" in capsys.readouterr().out
        assert checkpoint.load(run)["trainer"]["epoch"] == held
    finally:
        process.kill()
        process.communicate()

    assert main(command(tmp_path / "sweep", epochs, *options)) == 0
    out = capsys.readouterr().out
    assert f"epoch {held + 1:2}/{epochs}" in out and f"epoch {held:2}/{epochs}" not in out
    assert main(command(tmp_path / "whole", epochs, *options)) == 0
    assert_same(trained_state(run), trained_state(tmp_path / "whole" / CZMIG / "seed-0"))
    assert [record["epoch"] for record in read_metrics(run)] == list(range(1, epochs + 1))


def test_processes_share_a_folder(command, tmp_path):
    options = ["--rows", BN, CZMIG, "--seeds", "2"]
    processes = [start(command(tmp_path / "sweep", 2, *options)) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    titles = [line for out, _ in outputs for line in out.splitlines() if ", seed " in line]
    assert len(titles) == len(set(titles)) == 4
    for row in (BN, CZMIG):
        for seed in range(2):
            folder = tmp_path / "sweep" / row / f"seed-{seed}"
            assert [record["epoch"] for record in read_metrics(folder)] == [1, 2]
            assert len(list(folder.glob("events.*"))) == 1
            assert (folder / "summary.json").exists()
    assert not list((tmp_path / "sweep").rglob("*.tmp"))
