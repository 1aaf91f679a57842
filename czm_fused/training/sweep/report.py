"""Table 1 as measured, beside the paper's: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..files import replacing
from ..plots import name_network
from .folder import SweepFolder
from .results import check_comparable, check_folder, complete_results, departures, of_row
from .rows import BATCHNORM, TABLE1
from .statistics import Summary, interval, summarise, welch_p

MARKDOWN = "table1.md"
JSON = "table1.json"

_HEADER = (
    *("method", "lr", "zmg", "noise", "n", "test accuracy, %", "95 % interval", "p"),
    *("paper's, %", "paper's p"),
)
_EXPLANATION = """\
Test accuracy after the final epoch: mean ± standard deviation over n seeds, and the 95 % interval
of the mean (Student's t). p: Welch's two-sided t-test against BatchNorm, not corrected for the
number of rows. The paper's values are of 8 seeds; its p follows from its means and deviations.
"""


def measure(folder: SweepFolder) -> dict[str, Any]:
    """Return Table 1 from the complete runs in `folder`: what they share, where that departs from
    the protocol, and a record a row.

    Raises:
        TrainingError: a run is damaged, or does not belong with the others.
    """
    complete = complete_results(folder.path)
    settings = check_comparable(complete) if complete else {}
    accuracies = {
        row: {result.settings["seed"]: result.test_accuracy for result in of_row(complete, row)}
        for row in TABLE1
    }
    batchnorm = summarise(list(accuracies[BATCHNORM].values()))
    rows = []
    for row in TABLE1:
        sample = summarise(list(accuracies[row].values()))
        is_other = row is not BATCHNORM
        rows.append(
            {
                "row": row.name,
                "method": row.method,
                "lr": row.lr,
                "zmg": row.zmg,
                "noise": row.noise,
                "n": sample.n,
                "mean": sample.mean,
                "sd": sample.sd,
                "interval": interval(sample),
                "p": welch_p(sample, batchnorm) if is_other else None,
                "test_accuracies": dict(sorted(accuracies[row].items())),
                "diverged_seeds": folder.diverged(row),
                "paper": {
                    "n": row.paper.n,
                    "mean": row.paper.mean,
                    "sd": row.paper.sd,
                    "p": welch_p(row.paper, BATCHNORM.paper) if is_other else None,
                },
            }
        )
    return {"settings": settings, "options": departures(complete), "rows": rows}


def to_markdown(table: dict[str, Any]) -> str:
    """Return the table as Markdown that is also readable as it stands."""
    settings = table["settings"]
    cells = [_HEADER, *(_cells(row) for row in table["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    title = "# Table 1"
    if settings:
        title += f": {name_network(settings)}, {settings['epochs']} epochs"
    notes = [_EXPLANATION]
    if table["options"]:
        notes.append(f"Other than the paper's protocol: {', '.join(table['options'])}.\n")
    return "\n".join([title, "", *lines, "", *notes])


def write_report(folder: SweepFolder) -> str:
    """Write `table1.md` and `table1.json` into `folder`; return the Markdown.

    Raises:
        TrainingError: as `measure`, or the files cannot be written.
    """
    check_folder(folder.path)
    with folder.locked():
        table = measure(folder)
        markdown = to_markdown(table)
        with replacing(folder.path / MARKDOWN) as file:
            file.write(markdown.encode())
        with replacing(folder.path / JSON) as file:
            file.write((json.dumps(table, indent=2) + "\n").encode())
    return markdown


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    diverged = len(row["diverged_seeds"])
    paper = Summary(row["paper"]["n"], row["paper"]["mean"], row["paper"]["sd"])
    is_batchnorm = row["row"] == BATCHNORM.name
    return (
        "BatchNorm" if is_batchnorm else row["method"].upper(),
        f"{row['lr']:g}",
        "-" if is_batchnorm else f"{row['zmg']:g}",
        f"{row['noise']:g}",
        f"{row['n']}" + (f" ({diverged} diverged)" if diverged else ""),
        _mean_and_deviation(Summary(row["n"], row["mean"], row["sd"])),
        "-" if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"]),
        _p(row["p"]),
        _mean_and_deviation(paper),
        _p(row["paper"]["p"]),
    )


def _mean_and_deviation(sample: Summary) -> str:
    if sample.mean is None:
        return "-"
    return f"{sample.mean:.2f}" + ("" if sample.sd is None else f" ± {sample.sd:.2f}")


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"
