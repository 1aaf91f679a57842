"""The sweep and its table, in one process; test_table1_processes.py has what needs several."""

import errno
import io
import json
import math
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from logged_runs import write_run
from quick_runs import assert_same, read_metrics, trained_state
from scipy import stats

from czm_fused.training import checkpoint, data, files
from czm_fused.training import run as run_module
from czm_fused.training.__main__ import main
from czm_fused.training.loop import Trainer
from czm_fused.training.sweep import runner
from czm_fused.training.sweep.folder import SweepFolder
from czm_fused.training.sweep.rows import BATCHNORM, TABLE1
from czm_fused.training.sweep.statistics import Summary, interval, summarise, welch_p

BN, CZMIG, CZMI = "bn-lr0.1", "czmig-lr0.4-zmg0.85-noise0.1", "czmi-lr0.1-noise0"
QUICK = ["--dataset", "digits", "--depth", "8", "--epochs", "2", "--batch-size", "150"]
QUICK += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Spare the time that the pictures of each run take."""
    for name in ("plot_accuracy", "plot_filters"):
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)


@pytest.fixture
def table1(tmp_path, capsys):
    """Run `czm-train table1` on quick nets into tmp_path/sweep; return (status, out, err)."""

    def run(*options, out=tmp_path / "sweep", quick=QUICK):
        status = main(["table1", "--out", str(out), *quick, *map(str, options)])
        return status, *capsys.readouterr()

    return run


def cells(markdown, row):
    """Return the cells of a row of the printed table."""
    number = [candidate.name for candidate in TABLE1].index(row)
    lines = [line for line in markdown.splitlines() if line.startswith("| ")][1:]
    return [cell.strip() for cell in lines[number].strip("|").split("|")]


def test_rows_are_the_papers():
    assert len({row.name for row in TABLE1}) == len(TABLE1) == 11
    for row in TABLE1:
        settings = row.settings({}, 3, Path("somewhere"))
        assert row.trained(settings.as_dict())
        assert (settings.dataset, settings.depth, settings.seed) == ("cifar10", 110, 3)
        assert (settings.epochs, settings.milestones) == (200, (100, 150))
        assert (settings.batch_size, settings.momentum) == (128, 0.9)
        assert (settings.crop_padding, settings.flip) == (4, True)
        decay = (settings.weight_decay, settings.luma)
        assert decay == ((5e-4, 0.0) if row is BATCHNORM else (0.0, 5e-4))
    assert welch_p(TABLE1[0].paper, BATCHNORM.paper) == pytest.approx(0.14, abs=0.005)


def test_options_of_a_method_go_to_the_rows_that_have_it():
    given = {"head_lr": 0.4, "luma": 1e-3, "weight_decay": 1e-4, "epochs": 7}
    batchnorm = BATCHNORM.settings(given, 0, Path())
    czmig = TABLE1[0].settings(given, 0, Path())
    assert (batchnorm.head_lr, batchnorm.luma, batchnorm.weight_decay) == (None, 0.0, 1e-4)
    assert (czmig.head_lr, czmig.luma, czmig.weight_decay) == (0.4, 1e-3, 0.0)
    assert batchnorm.epochs == czmig.epochs == 7


def test_statistics_are_scipys():
    first, second = [93.1, 94.0, 93.6, 93.2], [92.0, 93.9, 92.8]
    sample = summarise(first)
    # Two ways to the same formula: a few roundings of values below 100.
    assert interval(sample) == pytest.approx(
        stats.t.interval(0.95, 3, stats.tmean(first), stats.sem(first)), rel=1e-12
    )
    expected = stats.ttest_ind(first, second, equal_var=False).pvalue
    assert welch_p(sample, summarise(second)) == pytest.approx(expected, rel=1e-10)


def test_statistics_of_too_few_values_are_unknown():
    assert summarise([]) == Summary(0)
    assert summarise([5.0]) == Summary(1, 5.0)
    assert interval(summarise([5.0])) is None
    assert welch_p(summarise([5.0]), summarise([1.0, 2.0])) is None
    assert welch_p(summarise([5.0, 5.0]), summarise([1.0, 1.0])) is None
    assert welch_p(summarise([5.0, 5.0]), summarise([1.0, 2.0])) is not None


def test_sweep_trains_every_run_as_czm_train_does(table1, train, tmp_path):
    status, out, err = table1("--rows", BN, CZMIG, "--seeds", 2)
    assert (status, err) == (0, "")
    sweep = tmp_path / "sweep"
    alone = tmp_path / "alone"
    options = ["--epochs", "2", "--batch-size", "150", "--method", "czmig", "--seed", "1"]
    assert train(*options, out=alone)[0] == 0
    assert_same(trained_state(sweep / CZMIG / "seed-1"), trained_state(alone))

    table = json.loads((sweep / "table1.json").read_text())
    assert table["settings"]["epochs"] == 2
    assert [row["n"] for row in table["rows"]] == [2, 2] + [0] * 9
    for row in table["rows"][:2]:
        finals = [
            read_metrics(sweep / row["row"] / f"seed-{seed}")[-1]["test_accuracy"]
            for seed in (0, 1)
        ]
        assert row["test_accuracies"] == {"0": finals[0], "1": finals[1]}
        assert row["mean"] == pytest.approx(sum(finals) / 2, rel=1e-12)
    markdown = (sweep / "table1.md").read_text()
    assert markdown in out
    assert cells(markdown, CZMIG)[-2:] == ["94.03 ± 0.14", "0.14"]

    assert out.count("test accuracy in the final epoch") == 4
    status, out, _ = table1("--rows", CZMI, BN, "--seeds", 1)
    assert status == 0
    assert out.count("test accuracy in the final epoch") == 1  # BatchNorm's was there
    assert [cells(out, row)[4] for row in (BN, CZMI)] == ["2", "1"]


def test_sweep_advances_seed_by_seed(table1, monkeypatch):
    trained = []

    def pretend(runs):
        trained.append([(settings.method, settings.seed) for settings, _ in runs])
        for settings, _ in runs:
            write_run(Path(settings.out), settings.as_dict(), [10.0, 20.0])

    monkeypatch.setattr(runner, "run_together", pretend)
    assert table1("--rows", CZMIG, BN, "--seeds", 2)[0] == 0
    assert trained == [[("czmig", 0)], [("bn", 0)], [("czmig", 1)], [("bn", 1)]]
    trained.clear()
    assert table1("--rows", CZMIG, BN, "--seeds", 5, "--parallel-seeds", 3)[0] == 0
    assert trained == [
        *([("czmig", 2)], [("bn", 2)]),
        *([("czmig", 3), ("czmig", 4)], [("bn", 3), ("bn", 4)]),
    ]


def test_interrupted_sweep_goes_on_where_it_was(table1, tmp_path, monkeypatch):
    command = ["--rows", BN, CZMIG, "--seeds", "1"]
    assert table1(*command, out=tmp_path / "whole")[0] == 0
    whole_step = Trainer._train_step
    steps = iter(range(100))

    def step(self, pixels, labels):
        if next(steps) == 7:  # two steps an epoch: in the last one of the second run
            raise KeyboardInterrupt
        return whole_step(self, pixels, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        status, _, err = table1(*command)
    assert status == 130
    assert err.count("\n") == 1 and "the same command goes on" in err
    status, out, _ = table1(*command)
    assert status == 0
    assert "BatchNorm, lr 0.1, seed 0" not in out and "epoch 1/2" not in out
    for row in (BN, CZMIG):
        assert_same(
            trained_state(tmp_path / "sweep" / row / "seed-0"),
            trained_state(tmp_path / "whole" / row / "seed-0"),
        )


def test_seeds_trained_together_end_as_alone(table1, tmp_path, monkeypatch):
    options = ["--rows", CZMIG, "--seeds", 2]
    assert table1(*options, out=tmp_path / "alone")[0] == 0
    whole_step = Trainer._train_step

    def step(self, pixels, labels):
        loss, hits = whole_step(self, pixels, labels)
        return (loss * math.nan if self.settings.seed == 1 else loss), hits

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        status, out, _ = table1(*options, "--parallel-seeds", 2)
    assert status == 0
    assert f"{TABLE1[0].title}, seed 0, 1\n" in out
    assert cells(out, CZMIG)[4] == "1 (1 diverged)"
    folders = [tmp_path / name / CZMIG / "seed-0" for name in ("sweep", "alone")]
    assert_same(*map(trained_state, folders))


def test_run_that_another_process_holds_is_passed_over(table1, tmp_path):
    sweep = tmp_path / "sweep"
    assert table1("--rows", BN, "--seeds", 1)[0] == 0
    with SweepFolder(sweep).claimed(TABLE1[0], 0) as is_ours:
        assert is_ours
        status, out, _ = table1("--rows", CZMIG, "--seeds", 1)
    assert status == 0
    assert "left to the processes that train them: 1 of 1 runs" in out
    assert not (sweep / CZMIG / "seed-0" / "metrics.jsonl").exists()
    status, out, _ = table1("--rows", CZMIG, "--seeds", 1)
    assert "left to" not in out
    assert (sweep / CZMIG / "seed-0" / "summary.json").exists()


def test_diverged_run_is_counted_and_not_trained_again(table1, tmp_path, monkeypatch):
    whole_step = Trainer._train_step
    trained = []

    def step(self, pixels, labels):
        loss, outputs = whole_step(self, pixels, labels)
        trained.append(self.settings.method)
        return (loss * math.nan if self.settings.method == "czmi" else loss), outputs

    monkeypatch.setattr(Trainer, "_train_step", step)
    status, out, _ = table1("--rows", CZMI, BN, "--seeds", 1)
    assert status == 0
    assert "diverged: the loss became nan in epoch 1/2" in out
    assert cells(out, CZMI)[4:6] == ["0 (1 diverged)", "-"]
    assert cells(out, BN)[4] == "1"
    trained.clear()
    status, out, _ = table1("--rows", CZMI, BN, "--seeds", 1)
    assert (status, trained) == (0, [])
    assert cells(out, CZMI)[4] == "0 (1 diverged)"


class FullDisk(io.FileIO):
    """A file on a disk with room for 1000 bytes."""

    room = 1000

    def write(self, content):
        FullDisk.room -= len(content)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def test_full_disk_keeps_the_last_checkpoint(table1, tmp_path, monkeypatch):
    assert table1("--rows", CZMIG, "--seeds", 1, out=tmp_path / "whole")[0] == 0
    whole_step = Trainer._train_step
    steps = iter(range(100))
    with monkeypatch.context() as patch:

        def step(self, pixels, labels):
            if next(steps) == 3:  # in the second of two epochs
                patch.setattr(files, "open", FullDisk, raising=False)
            return whole_step(self, pixels, labels)

        patch.setattr(Trainer, "_train_step", step)
        status, _, err = table1("--rows", CZMIG, "--seeds", 1)
    folder = tmp_path / "sweep" / CZMIG / "seed-0"
    assert status == 2
    assert err.count("\n") == 1
    assert "cannot write" in err and "checkpoint.pt" in err and "No space left on device" in err
    assert checkpoint.load(folder)["trainer"]["epoch"] == 1
    assert not list(folder.glob("*.tmp"))
    assert table1("--rows", CZMIG, "--seeds", 1)[0] == 0
    assert_same(trained_state(folder), trained_state(tmp_path / "whole" / CZMIG / "seed-0"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def begin_on_a_gpu(path):
    state = torch.load(path, weights_only=True)
    state["trainer"]["device_type"] = "cuda"
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "words"), [(truncate, "truncated"), (begin_on_a_gpu, "begun on cuda")]
)
def test_run_that_cannot_go_on_does_not_stop_the_others(table1, tmp_path, damage, words):
    assert table1("--rows", CZMIG, "--seeds", 1, "--epochs", 1)[0] == 0
    folder = tmp_path / "sweep" / CZMIG / "seed-0"
    (folder / "summary.json").unlink()
    damage(folder / "checkpoint.pt")
    content = (folder / "checkpoint.pt").read_bytes()
    status, out, err = table1("--rows", CZMIG, BN, "--seeds", 1, "--epochs", 1)
    assert status == 2
    assert err.count("\n") == 1 and "passed over 1 of 2 runs" in err
    assert str(folder) in err and words in err
    assert cells(out, BN)[4] == "1"
    assert (folder / "checkpoint.pt").read_bytes() == content


def fails(table1, *options, **keywords):
    status, _, err = table1(*options, **keywords)
    assert status == 2
    assert err.startswith("czm-train: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "resnet"], ["--rows resnet", CZMIG]),
        (["--seeds", "0"], ["--seeds must be at least 1"]),
        (["--seed", "1"], ["--seed is set by table1", "--seeds"]),
        (["--method", "bn"], ["--method is set by table1", "--rows"]),
        (["--resume"], ["--resume is set by table1", "the same command"]),
        (["--depth", "9"], ["--depth"]),
        (["--device", "abacus"], ["--device abacus", "not available"]),
        (["--dataset", "cifar10"], ["--dataset cifar10 needs --data-dir"]),
    ],
)
def test_bad_input_is_one_line(table1, options, words):
    err = fails(table1, *options)
    assert all(word in err for word in words)


def test_folder_of_another_protocol_is_refused(table1, tmp_path):
    path = tmp_path / "sweep" / "sweep.json"
    SweepFolder(tmp_path / "sweep").open({"dataset": "digits", "depth": 8, "epochs": 3})
    run = tmp_path / "sweep" / BN / "seed-0"
    run.mkdir(parents=True)
    (run / "checkpoint.pt").touch()
    content = path.read_text()
    assert "--epochs 3, not 2" in fails(table1, quick=[*QUICK, "--batch-size", "50"])

    saved = json.loads(content)
    del saved["rows"][BN]["momentum"]
    path.write_text(json.dumps(saved))
    err = fails(table1, "--epochs", 3, "--batch-size", 50)
    assert "another version" in err and "momentum" in err

    path.write_text(json.dumps({**saved, "format": "czm-train table1 0"}))
    assert "another version" in fails(table1)

    for damaged in (content[:50], "[]", '{"rows": 3}', "null"):
        path.write_text(damaged)
        assert "sweep.json" in fails(table1)
        assert path.read_text() == damaged


def test_value_that_was_refused_may_be_corrected(table1, tmp_path):
    assert "momentum" in fails(table1, "--rows", BN, "--seeds", "1", "--momentum", "-3")
    with SweepFolder(tmp_path / "sweep").claimed(BATCHNORM, 0):
        assert "begun with --momentum -3.0, not 0.9" in fails(table1, "--rows", BN, "--seeds", "1")
    status, out, _ = table1("--rows", BN, "--seeds", "1")
    assert status == 0
    assert cells(out, BN)[4] == "1"

    # What was trained counts, whether or not its checkpoint was kept.
    (tmp_path / "sweep" / BN / "seed-0" / "checkpoint.pt").unlink()
    assert "begun with --momentum 0.9, not 0.8" in fails(table1, "--momentum", "0.8")


def test_folder_with_other_files_is_refused(table1, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").write_text("")
    assert "holds files and no sweep.json" in fails(table1)
    (tmp_path / "file").write_text("")
    assert "cannot create --out" in fails(table1, out=tmp_path / "file" / "sweep")


def test_processes_on_different_devices_share_a_folder(tmp_path):
    SweepFolder(tmp_path).open({"device": "cuda", "data_dir": "/here"})
    SweepFolder(tmp_path).open({"device": "cpu", "data_dir": "/there", "workers": 3})


def test_one_process_at_a_time_fetches_the_data(table1, tmp_path, monkeypatch):
    was_locked = []
    load = data.load

    def look(settings):
        lock = FileLock(tmp_path / "sweep" / "sweep.lock")
        try:
            lock.acquire(timeout=0)
            lock.release()
            was_locked.append(False)
        except Timeout:
            was_locked.append(True)
        return load(settings)

    monkeypatch.setattr(data, "load", look)
    assert table1("--rows", BN, "--seeds", 1, "--download")[0] == 0
    assert was_locked == [True, False]  # fetching, then reading to train


def test_torchrun_is_refused(table1, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert "instead of torchrun" in fails(table1)


def test_report_shows_what_there_is(table1, tmp_path):
    folder = tmp_path / "runs"
    finals = {BN: [(0, 90.0), (1, 92.0), (2, 91.0)], CZMIG: [(0, 95.0), (3, 96.0)], CZMI: [(0, 50)]}
    for row in TABLE1:
        for seed, final in finals.get(row.name, []):
            given = {"method": row.method, "lr": row.lr, "noise": row.noise, "seed": seed}
            write_run(folder / f"{row.name}-{seed}", given, [10.0, final])
    status, out, _ = table1("--report", out=folder, quick=[])
    assert status == 0
    expected = stats.ttest_ind([95.0, 96.0], [90.0, 92.0, 91.0], equal_var=False).pvalue
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert cells(out, BN)[4:8] == ["3", "91.00 ± 1.00", f"{91 - half:.2f} to {91 + half:.2f}", "-"]
    assert cells(out, CZMIG)[4:6] == ["2", "95.50 ± 0.71"]
    assert cells(out, CZMIG)[7] == f"{expected:.2g}"
    assert cells(out, CZMI)[4:8] == ["1", "50.00", "-", "-"]
    assert cells(out, TABLE1[-1].name)[4:8] == ["0", "-", "-", "-"]
    assert (folder / "table1.md").read_text() in out
    assert "Other than the paper's protocol" not in out


def test_report_says_what_is_not_the_papers_protocol(table1, tmp_path):
    given = {"method": "czmig", "hold_out": 10, "stem": "plain", "momentum": 0.8}
    write_run(tmp_path / "runs" / "a", given, [10.0, 20.0])
    _, out, _ = table1("--report", out=tmp_path / "runs", quick=[])
    assert "ResNet8 on digits (10 training images held out as the test), 2 epochs" in out
    assert "protocol: --hold-out 10, --momentum 0.8, --stem plain.\n" in out


def test_report_refuses_runs_that_cannot_be_compared(table1, tmp_path):
    assert "there is no folder" in fails(table1, "--report", quick=[])
    err = fails(table1, "--report", "--depth", "8", quick=[])
    assert "--depth has no effect on --report" in err
    folder = tmp_path / "sweep"
    write_run(folder / "a", {"method": "bn"}, [10.0, 20.0])
    write_run(folder / "b", {"method": "czmig"}, [10.0, 20.0, 30.0])
    err = fails(table1, "--report", quick=[])
    assert "cannot be compared: --epochs was 2 and 3" in err

    write_run(folder / "b2" / "c", {"method": "bn", "seed": 1, "weight_decay": 0.0}, [10.0, 20.0])
    for file in (folder / "b").iterdir():
        file.unlink()
    assert "--weight-decay was 0.0005 and 0.0" in fails(table1, "--report", quick=[])

    write_run(folder / "a2", {"method": "bn"}, [10.0, 20.0])
    assert "hold the same run" in fails(table1, "--report", quick=[])

    (folder / "a" / "metrics.jsonl").write_text("{")
    assert "cannot read the run" in fails(table1, "--report", quick=[])


def test_help_names_the_rows(capsys):
    for command in ("table1", "figures"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert f"czm-train {command}" in out
        assert (CZMIG in out) == (command == "table1")


def test_folder_of_a_sweep_killed_at_its_start_is_taken(table1, tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    folder.path.mkdir()
    (folder.path / "sweep.json.tmp").write_text("{")
    folder.open({})
    assert (folder.path / "sweep.json").exists()
