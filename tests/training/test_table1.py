"""The study of Table 1, in one process and in three, one of which is killed."""

import json
import math
import signal
import subprocess
import sys
import time

import optuna
import pytest
from quick_runs import assert_same, read_metrics, trained_state
from scipy import stats

from czm_fused.training import checkpoint
from czm_fused.training import study as study_module
from czm_fused.training import table1 as table1_module
from czm_fused.training.__main__ import main
from czm_fused.training.table1 import BATCHNORM, TABLE1
from czm_fused.training.trainer import Trainer

BN, CZMIG, CZMI = "bn-lr0.1", "czmig-lr0.4-zmg0.85-noise0.1", "czmi-lr0.1-noise0"
QUICK = ["--dataset", "digits", "--depth", "8", "--epochs", "2", "--batch-size", "150"]
QUICK += ["--device", "cpu"]


@pytest.fixture
def table1(tmp_path, capsys):
    """Run `czm-train table1` on quick nets into tmp_path/sweep; return (status, out, err)."""

    def run(*options, folder=tmp_path / "sweep", quick=QUICK):
        status = main(["table1", "--folder", str(folder), *quick, *map(str, options)])
        return status, *capsys.readouterr()

    return run


def rows_of(folder):
    return {row["row"]: row for row in json.loads((folder / "table1.json").read_text())}


def test_rows_are_the_papers():
    assert len({row.name for row in TABLE1}) == len(TABLE1) == 11
    for row in TABLE1:
        config = row.config([]).checked()
        assert row.trained(config.as_dict())
        assert (config.dataset, config.depth) == ("cifar10", 110)
        assert (config.epochs, config.rate_drops) == (200, (100, 150))
        assert (config.batch_size, config.momentum) == (128, 0.9)
        assert (config.crop_padding, config.flip) == (4, True)
        decay = (config.weight_decay, config.luma)
        assert decay == ((5e-4, 0.0) if row is BATCHNORM else (0.0, 5e-4))


def test_options_of_a_method_go_to_the_rows_that_have_it():
    given = "--head-lr 0.4 --luma 1e-3 --weight-decay 1e-4 --epochs 7".split()
    batchnorm, czmig = BATCHNORM.config(given), TABLE1[0].config(given)
    assert (batchnorm.head_lr, batchnorm.luma, batchnorm.weight_decay) == (None, 0.0, 1e-4)
    assert (czmig.head_lr, czmig.luma, czmig.weight_decay) == (0.4, 1e-3, 0.0)
    assert czmig.as_dict()["classifier_luma"] == 1e-3
    assert (batchnorm.epochs, czmig.epochs) == (7, 7)


def test_place_of_the_noise_goes_to_the_rows_that_have_it():
    for row in TABLE1:
        expected = "branch" if row.noise else "unit"
        assert row.config(["--noise-on", "branch"]).noise_on == expected


def test_options_in_a_file_go_to_all_rows(tmp_path):
    (tmp_path / "options.yaml").write_text("epochs: 7\nchannels_last: true\nseeds: 2\n")
    for row in (BATCHNORM, TABLE1[0]):
        config = row.config(["--config", str(tmp_path / "options.yaml"), "--epochs", "9"])
        assert (config.epochs, config.channels_last, config.seeds) == (9, True, 2)
        assert (config.method, config.lr) == (row.method, row.lr)


def test_statistics_are_scipys():
    values = {CZMIG: [93.1, 94.0, 93.6, 93.2], BN: [93.0, 92.9, 93.3], CZMI: [5.0]}
    study = optuna.create_study()
    for row, of_row in values.items():
        for seed, value in enumerate(of_row):
            trial = optuna.create_trial(value=value, user_attrs={"row": row, "seed": seed})
            study.add_trial(trial)
    found = table1_module.measure(study)
    sample = values[CZMIG]
    expected = stats.t.interval(0.95, 3, stats.tmean(sample), stats.sem(sample))
    assert tuple(found.loc[CZMIG, ["low", "high"]]) == pytest.approx(expected, rel=1e-12)
    assert found["sd"][CZMIG] == pytest.approx(stats.tstd(sample), rel=1e-12)
    welch = stats.ttest_ind(sample, values[BN], equal_var=False).pvalue
    assert found["p"][CZMIG] == pytest.approx(welch, rel=1e-12)
    assert math.isnan(found["p"][BN])
    assert (found["n"][CZMI], found["mean"][CZMI]) == (1, 5.0)
    assert math.isnan(found["sd"][CZMI]) and math.isnan(found["low"][CZMI])
    assert found["n"].sum() == 8 and math.isnan(found["mean"]["czmi-lr0.2-noise0"])


def test_paper_p_is_welchs():
    found = table1_module.measure(optuna.create_study())["paper_p"]
    assert found[CZMIG] == pytest.approx(0.14, abs=0.005)
    assert math.isnan(found[BN])


def test_table_drops_columns_where_the_terminal_is_narrow():
    frame = table1_module.table(table1_module.measure(optuna.create_study()))
    assert "paper's p" in table1_module.to_markdown(frame)
    narrow = table1_module.to_markdown(frame, 79)
    assert all(len(line) <= 79 for line in narrow.splitlines())
    assert "test accuracy, %" in narrow


OF_SOME_ROWS = (
    "--residual-bias --gain=2.0 --stem=plain --head-lr=0.01 --bias-lr=0.2 --classifier-luma=0.5 "
    "--grad-norm=0.1 --center-every=20 --noise-on=branch"
)


@pytest.mark.parametrize(
    ("given", "departures"),
    [
        ("", ""),
        ("--depth 20 --weight-decay 1e-4", "--depth=20 --weight-decay=0.0001"),
        ("--luma 0.5", "--luma=0.5"),
        ("--luma 0.5 --classifier-luma 5e-4", "--luma=0.5 --classifier-luma=0.0005"),
        (OF_SOME_ROWS, OF_SOME_ROWS),
    ],
)
def test_report_names_the_departures_of_all_rows(tmp_path, given, departures):
    arguments = ["--folder", str(tmp_path), "--epochs", "7", *given.split()]
    configs = {row.name: row.config(arguments) for row in TABLE1}
    study = study_module.open_study("table1", configs[BN], configs)
    report = table1_module.write_report(study, tmp_path)
    line = f"Other than the paper's protocol: {departures}" if departures else ""
    assert ([each for each in report.splitlines() if "Other than" in each] or [""]) == [line]
    assert line in (tmp_path / "table1.md").read_text()


def test_study_trains_every_run_as_czm_train_does(table1, train, tmp_path):
    status, out, err = table1("--rows", BN, CZMIG, "--seeds", 2)
    assert (status, err) == (0, "")
    sweep = tmp_path / "sweep"
    options = ["--epochs", "2", "--batch-size", "150", "--method", "czmig", "--seed", "1"]
    assert train(*options, out=tmp_path / "alone")[0] == 0
    assert_same(trained_state(sweep / CZMIG / "seed-1"), trained_state(tmp_path / "alone"))

    rows = rows_of(sweep)
    assert [row["n"] for row in rows.values()] == [2, 2] + [0] * 9
    for name in (BN, CZMIG):
        finals = [read_metrics(sweep / name / f"seed-{s}")[-1]["test_accuracy"] for s in (0, 1)]
        assert rows[name]["test_accuracies"] == {"0": finals[0], "1": finals[1]}
        assert rows[name]["mean"] == pytest.approx(sum(finals) / 2, rel=1e-12)

    status, out, _ = table1("--rows", CZMI, BN, "--seeds", 1)
    assert status == 0
    assert out.count("test accuracy in the final epoch") == 1  # BatchNorm's was there
    before = (sweep / "table1.json").read_bytes()
    assert table1("--report", quick=[])[0] == 0
    assert (sweep / "table1.json").read_bytes() == before


def test_interrupted_study_goes_on_from_the_checkpoint(table1, tmp_path, monkeypatch):
    command = ["--rows", BN, CZMIG, "--seeds", "1"]
    assert table1(*command, folder=tmp_path / "whole")[0] == 0
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
    assert f"{BN}, seed 0" not in out and "epoch 1/2" not in out
    for row in (BN, CZMIG):
        folders = [tmp_path / name / row / "seed-0" for name in ("sweep", "whole")]
        assert_same(*map(trained_state, folders))


def test_run_that_a_lost_worker_completed_is_not_trained_again(table1, tmp_path, monkeypatch):
    whole_run = study_module.run

    def lost(*args, **keywords):
        whole_run(*args, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_module, "run", lost)
        assert table1("--rows", BN, "--seeds", 1)[0] == 130
    status, out, _ = table1("--rows", BN, "--seeds", 1)
    assert status == 0
    assert "test accuracy in the final epoch" not in out
    assert rows_of(tmp_path / "sweep")[BN]["n"] == 1


def test_diverged_run_is_counted_and_not_trained_again(table1, tmp_path, monkeypatch):
    whole_step = Trainer._train_step
    trained = []

    def step(self, pixels, labels):
        sums = whole_step(self, pixels, labels)
        trained.append(self.config.method)
        return sums * math.nan if self.config.method == "czmi" else sums

    monkeypatch.setattr(Trainer, "_train_step", step)
    status, out, _ = table1("--rows", CZMI, BN, "--seeds", 1)
    assert status == 0
    assert "diverged: the loss became nan in epoch 1/2" in out
    rows = rows_of(tmp_path / "sweep")
    assert (list(rows[CZMI]["diverged"]), rows[BN]["n"]) == (["0"], 1)
    trained.clear()
    assert table1("--rows", CZMI, BN, "--seeds", 1)[0] == 0
    assert trained == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def move_to_another_device(path):
    state = checkpoint.load(path)
    state["trainer"]["device_type"] = "cuda"
    checkpoint.save(path, state)


@pytest.mark.parametrize(
    ("change", "word"), [(truncate, "damaged"), (move_to_another_device, "trained on cuda")]
)
def test_run_that_cannot_go_on_does_not_stop_the_others(
    table1, tmp_path, monkeypatch, change, word
):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert table1("--rows", CZMIG, "--seeds", 1)[0] == 130
    path = tmp_path / "sweep" / CZMIG / "seed-0" / "checkpoint.pt"
    change(path)
    content = path.read_bytes()
    status, _, err = table1("--rows", CZMIG, BN, "--seeds", 1)
    assert status == 2
    assert err.count("\n") == 1 and "passed over 1 runs" in err
    assert str(path.parent) in err and word in err
    assert rows_of(tmp_path / "sweep")[BN]["n"] == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "resnet"], ["--rows resnet", CZMIG]),
        (["--seeds", "0"], ["--seeds must be at least 1"]),
        (["--heartbeat", "0"], ["--heartbeat must be at least 1"]),
        (["--seed", "1"], ["--seed is set by the study", "--seeds"]),
        (["--method", "plain"], ["--method is set by the study", "--rows"]),
        (["--resume"], ["Unrecognized options: --resume", "czm-train table1 --help"]),
        (["--depth", "9"], ["--depth"]),
        (["--device", "abacus"], ["--device abacus", "not available"]),
        (["--dataset", "cifar10"], ["--dataset cifar10 needs --data-dir"]),
        (["--storage", "nonsense"], ["cannot reach the storage nonsense", "--storage"]),
        (["--storage", "sqlite:////nowhere/at/all.db"], ["cannot reach the storage"]),
    ],
)
def test_bad_input_is_one_line(table1, options, words):
    status, _, err = table1(*options)
    assert status == 2
    assert err.startswith("czm-train: error: ") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_study_of_another_protocol_or_version_is_refused(table1, tmp_path):
    assert table1("--rows", BN, "--seeds", 1, "--epochs", 1)[0] == 0
    status, _, err = table1("--rows", BN, "--seeds", 1)
    assert status == 2 and "begun with --epochs 1, not 2" in err
    study = optuna.load_study(
        study_name="table1", storage=f"sqlite:///{tmp_path / 'sweep' / 'table1.db'}"
    )
    study.set_user_attr("protocol", {"format": 0, "rows": {}})
    status, _, err = table1("--rows", BN, "--seeds", 1, "--epochs", 1)
    assert status == 2 and "another version" in err


def test_folder_with_other_files_is_refused(table1, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").write_text("")
    status, _, err = table1()
    assert status == 2 and "holds files and no table1.db" in err
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["thesis.tex"]


def test_three_workers_one_killed_finish_every_run_once(tmp_path):
    command = ["--rows", BN, CZMIG, "--seeds", "2", "--epochs", "4", "--hold-out", "200"]
    shared = tmp_path / "shared"
    arguments = [*QUICK, *command, "--folder", str(shared), "--heartbeat", "1"]
    program = [sys.executable, "-m", "czm_fused.training", "table1", *arguments]
    logs = [open(tmp_path / f"{number}.log", "w+") for number in range(3)]
    workers = [subprocess.Popen(program, stdout=log, stderr=subprocess.STDOUT) for log in logs]
    try:
        def begun():
            for log in logs:
                log.flush()
            return "epoch 1/4" in (tmp_path / "0.log").read_text()

        while not begun() and workers[0].poll() is None:
            time.sleep(0.02)
        workers[0].send_signal(signal.SIGKILL)
        for worker in workers[1:]:
            assert worker.wait(timeout=600) == 0, (tmp_path / "1.log").read_text() + (
                tmp_path / "2.log"
            ).read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for log in logs:
            log.close()
    printed = "".join((tmp_path / f"{number}.log").read_text() for number in range(3))
    for row in (BN, CZMIG):
        for seed in (0, 1):
            run = shared / row / f"seed-{seed}"
            assert printed.count(f"see {run}\n") == 1
            assert [record["epoch"] for record in read_metrics(run)] == [1, 2, 3, 4]
            assert checkpoint.load(run)["trainer"]["epoch"] == 4
    alone = ["--folder", str(tmp_path / "alone")]
    subprocess.run([*program, *alone], check=True, capture_output=True, timeout=600)
    tables = [(tmp_path / name / "table1.json").read_bytes() for name in ("shared", "alone")]
    assert tables[0] == tables[1]
