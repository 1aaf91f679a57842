"""Table 1 as measured, beside the paper's: for the terminal, as Markdown and as JSON."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import replacing
from ..config import Config, option
from ..plots import name_network
from .rows import BATCHNORM, LOCAL, ROW_OPTIONS, TABLE1

if TYPE_CHECKING:
    import optuna
    import pandas as pd

_PAPER_SEEDS = 8
_EXPLANATION = """\
Test accuracy after the final epoch: mean ± standard deviation over n seeds, and the 95 % interval
of the mean (Student's t). p: Welch's two-sided t-test against BatchNorm, not corrected for the
number of rows. The paper's values are of 8 seeds; its p follows from its means and deviations.
"""
# Least important first: what a narrow terminal leaves out.
_DROPPED_FIRST = ("paper's p", "95 % interval", "p", "paper's, %", "zmg", "noise")


def measure(study: optuna.Study) -> list[dict[str, Any]]:
    """Return a record for each row of Table 1, from the complete trials of `study`."""
    from scipy import stats

    trials = study.get_trials(deepcopy=False)
    records = []
    for row in TABLE1:
        own = [trial for trial in trials if trial.user_attrs.get("row") == row.name]
        found = {
            trial.user_attrs["seed"]: trial.user_attrs["summary"]["test_accuracy"]
            for trial in own
            if "summary" in trial.user_attrs
        }
        values = [found[seed] for seed in sorted(found)]
        records.append(
            {
                "row": row.name,
                **{name: getattr(row, name) for name in ROW_OPTIONS},
                **summarise(values),
                "test_accuracies": {str(seed): found[seed] for seed in sorted(found)},
                "diverged_seeds": sorted(
                    trial.user_attrs["seed"] for trial in own if "diverged" in trial.user_attrs
                ),
                "paper": {"n": _PAPER_SEEDS, "mean": row.mean, "sd": row.sd},
            }
        )
    batchnorm = next(record for record in records if record["row"] == BATCHNORM.name)
    for record in records:
        for one, other in ((record, batchnorm), (record["paper"], batchnorm["paper"])):
            known = one is not other and one["sd"] is not None and other["sd"] is not None
            one["p"] = None
            if known and (one["sd"] or other["sd"]):
                samples = (x[name] for x in (one, other) for name in ("mean", "sd", "n"))
                test = stats.ttest_ind_from_stats(*samples, equal_var=False)
                one["p"] = float(test.pvalue)
    return records


def summarise(values: list[float]) -> dict[str, Any]:
    """Return n, mean, standard deviation and 95 % interval of the mean; None where unknown."""
    import pandas as pd
    from scipy import stats

    sample = pd.Series(values, dtype="float64")
    n = len(sample)
    mean, sd = float(sample.mean()) if n else None, float(sample.std()) if n > 1 else None
    interval = None
    if sd is not None:
        half = float(stats.t.ppf(0.975, n - 1) * sample.sem())
        interval = [float(sample.mean()) - half, float(sample.mean()) + half]
    return {"n": n, "mean": mean, "sd": sd, "interval": interval}


def table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the records as the cells of the printed table."""
    import pandas as pd

    def accuracy(sample: dict[str, Any]) -> str:
        if sample["mean"] is None:
            return "-"
        return f"{sample['mean']:.2f}" + ("" if sample["sd"] is None else f" ± {sample['sd']:.2f}")

    rows = []
    for record in records:
        is_batchnorm = record["row"] == BATCHNORM.name
        diverged = len(record["diverged_seeds"])
        rows.append(
            {
                "method": "BatchNorm" if is_batchnorm else record["method"].upper(),
                "lr": f"{record['lr']:g}",
                "zmg": "-" if is_batchnorm else f"{record['zmg']:g}",
                "noise": f"{record['noise']:g}",
                "n": f"{record['n']}" + (f" ({diverged} diverged)" if diverged else ""),
                "test accuracy, %": accuracy(record),
                "95 % interval": "{:.2f} to {:.2f}".format(*record["interval"])
                if record["interval"]
                else "-",
                "p": "-" if record["p"] is None else f"{record['p']:.2g}",
                "paper's, %": accuracy(record["paper"]),
                "paper's p": "-" if is_batchnorm else f"{record['paper']['p']:.2g}",
            }
        )
    return pd.DataFrame(rows)


def to_markdown(frame: pd.DataFrame, columns: int | None = None) -> str:
    """Return a table as Markdown; with `columns`, of at most so many where that can be had."""
    frame = frame.copy()
    for name in ("", *_DROPPED_FIRST):
        if name:
            frame = frame.drop(columns=name)
        cells = [list(frame.columns), *frame.to_numpy().tolist()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if columns is None or sum(widths) + 3 * len(widths) + 1 <= columns:
            break
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_report(study: optuna.Study, folder: Path) -> str:
    """Write `table1.md` and `table1.json` into `folder`; return the table for the terminal.

    Raises:
        TrainingError: the files cannot be written.
    """
    records = measure(study)
    summaries = [t.user_attrs["summary"] for t in study.trials if "summary" in t.user_attrs]
    options = departures(summaries)
    title = "# Table 1"
    if summaries:
        title += f": {name_network(summaries[0])}, {summaries[0]['epochs']} epochs"
    notes = [_EXPLANATION]
    if options:
        notes.append(f"Other than the paper's protocol: {', '.join(options)}.\n")
    frame = table(records)
    with replacing(folder / "table1.md") as file:
        file.write("\n".join([title, "", to_markdown(frame), "", *notes]).encode())
    content = {"options": options, "rows": records}
    with replacing(folder / "table1.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
    narrow = to_markdown(frame, shutil.get_terminal_size().columns - 1)
    return "\n".join([title, "", narrow, "", *notes])


def departures(summaries: list[dict[str, Any]]) -> list[str]:
    """Return the options of the runs that are not the defaults of their method and data set."""
    found: set[str] = set()
    for summary in summaries:
        given = {name: summary[name] for name in ("method", "dataset", "epochs")}
        default = Config(**given).resolve().as_dict()
        for name, value in default.items():
            if name not in (*LOCAL, *ROW_OPTIONS, "depth", "seed") and summary[name] != value:
                found.add(f"{option(name)} {summary[name]}")
    return sorted(found)
