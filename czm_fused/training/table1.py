"""`czm-train table1`: the rows of the paper's Table 1 as trials of a study, and their results."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState
from scipy import stats

from . import data
from .checkpoint import replacing
from .cli import parse, to_arguments
from .config import WITHOUT_EFFECT, Config, Dataset, option
from .errors import TrainingError
from .plots import name_network
from .run import pick_device
from .study import StudyOptions, open_study, work

ROW_OPTIONS = ("method", "lr", "zmg", "noise")
_EXPLANATION = """\
Test accuracy after the final epoch: mean ± standard deviation over n seeds, and the 95 % interval
of the mean (Student's t). p: Welch's two-sided t-test against BatchNorm, not corrected for the
number of rows. The paper's values are of 8 seeds; its p follows from its means and deviations.
"""
# Least important first: what a narrow terminal leaves out.
_DROPPED_FIRST = ("paper's p", "95 % interval", "p", "paper's, %", "zmg", "noise")


@dataclass(frozen=True, kw_only=True)
class Table1(StudyOptions):
    """Train the rows of the paper's Table 1, by default ResNet110 on CIFAR-10, and print the table.

    Interrupted or killed, the same command goes on where it was; started several times, on one
    device or on many machines, it shares the work. All options of czm-train apply to all runs, but
    --weight-decay to BatchNorm alone, --head-lr, --bias-lr, --luma, --classifier-luma, --grad-norm,
    --center-every, --residual-bias, --gain and --stem to the other rows, and --noise-on to those
    with noise. optuna-dashboard shows the study."""

    dataset: Dataset = "cifar10"
    """As for czm-train."""
    folder: str = "runs/table1"
    """Holds a folder for each run, the study and the table."""
    seeds: int = 8
    """Train seeds 0 to this minus 1."""
    rows: tuple[str, ...] = ()
    """Names as in czmig-lr0.4-zmg0.85-noise0.1 (default: all eleven)."""
    report: bool = False
    """Train nothing; print the table of the complete runs."""


@dataclass(frozen=True)
class Row:
    """A row of Table 1, with the mean and deviation of the paper's test accuracies, %."""

    method: str
    lr: float
    zmg: float
    noise: float
    paper_mean: float
    paper_sd: float
    paper_n: int = 8

    @property
    def label(self) -> str:
        """The method as people call it."""
        return "BatchNorm" if self.method == "bn" else self.method.upper()

    @property
    def name(self) -> str:
        """The name for `--rows` and folders, as in `czmig-lr0.4-zmg0.85-noise0.1`."""
        return "-".join([self.method, *(f"{name}{value:g}" for name, value in self._shown())])

    @property
    def title(self) -> str:
        """The row for people, as in `CZMIG, lr 0.4, zmg 0.85, noise 0.1`."""
        return ", ".join([self.label, *(f"{name} {value:g}" for name, value in self._shown())])

    @property
    def options(self) -> dict[str, Any]:
        """The options that make a run one of the row."""
        return {name: getattr(self, name) for name in ROW_OPTIONS}

    def _shown(self) -> list[tuple[str, float]]:
        names = {"bn": ("lr",), "czmi": ("lr", "noise")}.get(self.method, ("lr", "zmg", "noise"))
        return [(name, getattr(self, name)) for name in names]

    def config(self, arguments: Sequence[str]) -> Table1:
        """Return the config of the row's runs; options that its method lacks are left out.

        Raises:
            TrainingError: a value is out of range, or the study itself sets the option.
        """
        given = parse(Table1, arguments, to_arguments(self.options), "czm-train table1")
        base = Table1(**self.options, dataset=given.dataset)
        for name in (*ROW_OPTIONS, "seed", "out"):
            if getattr(given, name) != getattr(base, name):
                raise TrainingError(
                    f"{option(name)} is set by the study for each run: leave it out "
                    "(--rows and --seeds choose the runs, --folder their place)"
                )
        foreign = WITHOUT_EFFECT["bn"] if self.method == "bn" else ("weight_decay",)
        foreign += () if self.noise else ("noise_on",)
        config = replace(given, **{name: getattr(base, name) for name in foreign})
        config.checked()
        return config

    def trained(self, config: Mapping[str, Any]) -> bool:
        """Return True if a run with these options is one of the row."""
        return all(config.get(name) == value for name, value in self.options.items())


BATCHNORM = Row("bn", 0.1, 0.0, 0.0, 93.70, 0.55)

# In the paper's order. It contradicts itself on the last row's method; a zmg of 1 has a meaning for
# CZMIG alone.
TABLE1 = (
    Row("czmig", 0.4, 0.85, 0.1, 94.03, 0.14),
    BATCHNORM,
    Row("czmig", 0.4, 0.98, 0.1, 93.64, 0.11),
    Row("czmig", 0.4, 0.85, 0.0, 93.57, 0.12),
    Row("czmig", 0.2, 0.85, 0.0, 93.44, 0.18),
    Row("czmi", 0.4, 0.0, 0.1, 93.33, 0.11),
    Row("czmi", 0.1, 0.0, 0.0, 93.06, 0.22),
    Row("czmi", 0.2, 0.0, 0.0, 92.95, 0.23),
    Row("czmi", 0.4, 0.0, 0.0, 92.13, 0.26),
    Row("czmig", 0.1, 0.85, 0.0, 92.95, 0.20),
    Row("czmig", 0.1, 1.0, 0.1, 91.03, 0.25),
)
ROWS = {row.name: row for row in TABLE1}


def main(arguments: Sequence[str]) -> None:
    """Train the rows of Table 1, or what is left of them, and print the table.

    Raises:
        TrainingError: the input is bad, or a run could not be trained.
    """
    configs = {name: row.config(arguments) for name, row in ROWS.items()}
    options = configs[BATCHNORM.name]
    folder = Path(options.folder)
    for name in options.rows:
        if name not in ROWS:
            raise TrainingError(
                f"--rows {name} is no row of Table 1: choose from {', '.join(ROWS)}"
            )
    if options.report:
        if not (options.storage or (folder / "table1.db").exists()):
            raise TrainingError(f"there is no study in --folder {folder}: train it first")
        print(write_report(open_study("table1", options, None), folder))
        return
    pick_device(options.device)
    study = open_study("table1", options, configs, data.load(options).digest())
    for seed in range(options.seeds):
        for row in options.rows or ROWS:
            if not _trials(study, row, seed):
                study.enqueue_trial({}, user_attrs={"row": row, "seed": seed})

    def config_of(trial: optuna.Trial) -> Config | None:
        row, seed = trial.user_attrs.get("row", ""), trial.user_attrs.get("seed", -1)
        if not row or _trials(study, row, seed)[0].number != trial.number:
            return None  # two workers enqueued the run at once, or took the last one at once
        print(f"\n{row}, seed {seed}", flush=True)
        return replace(configs[row], seed=seed, out=str(folder / row / f"seed-{seed}"))

    passed_over = work(study, config_of, options.heartbeat)
    print("\n" + write_report(study, folder))
    if passed_over:
        raise TrainingError(f"passed over {len(passed_over)} runs, the first {passed_over[0]}")


def _trials(study: optuna.Study, row: str, seed: int) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a run that were not lost, the one that counts first."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if (trial.user_attrs.get("row"), trial.user_attrs.get("seed")) == (row, seed)
        and trial.state != TrialState.FAIL
    ]


def measure(study: optuna.Study) -> pd.DataFrame:
    """Return the options, the results and the paper's numbers of each row, by its name."""
    columns = ["state", "value", "user_attrs_row", "user_attrs_seed"]
    trials = study.trials_dataframe(("state", "value", "user_attrs")).reindex(columns=columns)
    trials = trials.set_axis(["state", "value", "row", "seed"], axis=1).sort_values("seed")
    done, diverged = (trials[trials["state"] == state] for state in ("COMPLETE", "PRUNED"))
    frame = pd.DataFrame([asdict(row) for row in TABLE1], index=list(ROWS))
    frame = frame.join(done.groupby("row")["value"].agg(n="count", mean="mean", sd="std"))
    frame["n"] = frame["n"].fillna(0).astype(int)
    half = stats.t.ppf(0.975, frame["n"].to_numpy() - 1) * frame["sd"] / frame["n"] ** 0.5
    frame["low"], frame["high"] = frame["mean"] - half, frame["mean"] + half
    for names in (("mean", "sd", "n", "p"), ("paper_mean", "paper_sd", "paper_n", "paper_p")):
        sample = frame[list(names[:3])].to_numpy(float)
        batchnorm = sample[TABLE1.index(BATCHNORM)]
        test = stats.ttest_ind_from_stats(*sample.T, *batchnorm, equal_var=False)
        frame[names[3]] = pd.Series(test.pvalue, frame.index).drop(BATCHNORM.name)
    for name, part in (("test_accuracies", done), ("diverged", diverged)):
        of_seeds = part.set_index(part["seed"].astype("Int64").astype(str)).groupby("row")["value"]
        found = {row: values.to_dict() for row, values in of_seeds}
        frame[name] = [found.get(row, {}) for row in frame.index]
    return frame


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what `measure` found as the cells of the printed table."""

    def cells(form: str, *names: str) -> list[str]:
        rows = frame[list(names)].to_numpy()
        return ["-" if pd.isna(row).any() else form.format(*row) for row in rows]

    diverged = [f" ({len(seeds)} diverged)" if seeds else "" for seeds in frame["diverged"]]
    spread = [each if each != "-" else "" for each in cells(" ± {:.2f}", "sd")]
    printed = pd.DataFrame(
        {
            "method": [ROWS[row].label for row in frame.index],
            "lr": cells("{:g}", "lr"),
            "zmg": cells("{:g}", "zmg"),
            "noise": cells("{:g}", "noise"),
            "n": map(str.__add__, frame["n"].astype(str), diverged),
            "test accuracy, %": map(str.__add__, cells("{:.2f}", "mean"), spread),
            "95 % interval": cells("{:.2f} to {:.2f}", "low", "high"),
            "p": cells("{:.2g}", "p"),
            "paper's, %": cells("{:.2f} ± {:.2f}", "paper_mean", "paper_sd"),
            "paper's p": cells("{:.2g}", "paper_p"),
        },
        frame.index,
    )
    printed.loc[BATCHNORM.name, "zmg"] = "-"
    return printed


def to_markdown(frame: pd.DataFrame, columns: int | None = None) -> str:
    """Return a table as Markdown; with `columns`, of at most so many where that can be had."""
    for dropped in range(len(_DROPPED_FIRST) + 1):
        part = frame.drop(columns=list(_DROPPED_FIRST[:dropped]))
        widths = [max(map(len, [name, *part[name]])) for name in part]
        if columns is None or sum(widths) + 3 * len(widths) + 1 <= columns:
            break
    rows = [list(part), ["-" * width for width in widths], *part.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def _departures(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options other than the paper's protocol, from the configs of all rows by name."""
    found: dict[str, Any] = {}
    for name, config in rows.items():
        given = {each: config[each] for each in ("dataset", "epochs")}
        paper = Config(**ROWS[name].options, **given).as_dict()
        # Where --classifier-luma is left out, it is --luma.
        paper["classifier_luma"] = config["luma"]
        found |= {each: value for each, value in config.items() if value != paper[each]}
    return found


def write_report(study: optuna.Study, folder: Path) -> str:
    """Write `table1.md` and `table1.json` into `folder`; return the table for the terminal."""
    frame = measure(study)
    rows = study.user_attrs["protocol"]["rows"]
    config, departures = rows[BATCHNORM.name], _departures(rows)
    title = f"# Table 1: {name_network(config)}, {config['epochs']} epochs"
    notes = _EXPLANATION
    if departures:
        notes += f"\nOther than the paper's protocol: {' '.join(to_arguments(departures))}\n"
    printed = table(frame)
    with replacing(folder / "table1.md") as file:
        file.write("\n".join([title, "", to_markdown(printed), "", notes]).encode())
    with replacing(folder / "table1.json") as file:
        file.write(
            frame.rename_axis("row").reset_index().to_json(orient="records", indent=2).encode()
        )
    narrow = to_markdown(printed, shutil.get_terminal_size().columns - 1)
    return "\n".join([title, "", narrow, "", notes])
