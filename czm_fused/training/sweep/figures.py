"""The paper's figures 1 to 5 from the logs of the runs, and what LUMA and CZM do to the filters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..plots import name_network, panels, save
from .results import Result, all_results, check_comparable, of_row
from .rows import BATCHNORM, TABLE1, Row, find
from .statistics import Summary, summarise

_COLOURS = {row: f"C{i}" for i, row in enumerate(row for row in TABLE1 if row is not BATCHNORM)}
_COLOURS[BATCHNORM] = "black"

_CZMIG = find(["czmig-lr0.4-zmg0.85-noise0.1"])[0]

Values = Callable[[dict[str, Any]], "float | None"]


@dataclass(frozen=True)
class Comparison:
    """An accuracy figure.

    Attributes:
        about: what the rows are compared in.
        rows: in the order of the legend.
        share: of the epochs to draw, from the first.
    """

    name: str
    about: str
    rows: Sequence[Row]
    share: float = 1.0


_PARTS = [
    BATCHNORM,
    *find(["czmig-lr0.4-zmg0.85-noise0.1", "czmig-lr0.4-zmg0.85-noise0"]),
    *find(["czmi-lr0.4-noise0.1", "czmi-lr0.4-noise0"]),
]
COMPARISONS = (
    Comparison("figure1", "zero-mean gradients and noise, one at a time", _PARTS),
    Comparison(
        "figure2",
        "learning rates of zero-mean initialisation alone",
        [BATCHNORM, *find(["czmi-lr0.1-noise0", "czmi-lr0.2-noise0", "czmi-lr0.4-noise0"])],
    ),
    Comparison(
        "figure3",
        "learning rates with zero-mean gradients",
        [
            BATCHNORM,
            *find([f"czmig-lr{lr}-zmg0.85-noise0" for lr in (0.1, 0.2, 0.4)]),
        ],
    ),
    Comparison(
        "figure4",
        "shares of the gradient's mean that are removed (CZMI: zmg 0)",
        [
            BATCHNORM,
            *find(["czmi-lr0.4-noise0.1", "czmig-lr0.4-zmg0.85-noise0.1"]),
            *find(["czmig-lr0.4-zmg0.98-noise0.1", "czmig-lr0.1-zmg1-noise0.1"]),
        ],
    ),
    Comparison("figure5", "the first tenth of the epochs", _PARTS, share=0.1),
)


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw the figures that the runs under `folder` have rows for, as PNG files in `out`.

    BatchNorm's row is in every comparison, and is none alone.

    Returns:
        The files.

    Raises:
        TrainingError: there are no runs of Table 1's rows, they cannot be compared, or the disk
            refuses.
    """
    found = all_results(folder)
    results = [result for row in TABLE1 for result in of_row(found, row)]
    if not results:
        raise TrainingError(f"there is no run of a row of Table 1 under {folder}")
    settings = check_comparable(results)
    network = name_network(settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot create --out {out}: {error}") from error
    drawn = []
    for comparison in COMPARISONS:
        if any(of_row(results, row) for row in comparison.rows if row is not BATCHNORM):
            drawn.append(out / f"{comparison.name}.png")
            epochs = max(1, round(comparison.share * settings["epochs"]))
            _draw_accuracies(drawn[-1], comparison, results, network, epochs)
    for name, draw_one in (("filters", _draw_filters), ("rejection", _draw_rejection)):
        path = out / f"{name}.png"
        if draw_one(path, results, network):
            drawn.append(path)
    return drawn


def mean_curve(
    runs: Iterable[Result], value: Values
) -> tuple[list[int], list[float], list[float], list[int]]:
    """Return epochs, and over the runs that logged a value there: means, deviations, their number.

    A deviation of fewer than two runs is 0.
    """
    by_epoch: dict[int, list[float]] = {}
    for run in runs:
        for record in run.history:
            found = value(record)
            if found is not None:
                by_epoch.setdefault(record["epoch"], []).append(found)
    epochs = sorted(by_epoch)
    samples: list[Summary] = [summarise(by_epoch[epoch]) for epoch in epochs]
    return (
        epochs,
        [sample.mean or 0.0 for sample in samples],
        [sample.sd or 0.0 for sample in samples],
        [sample.n for sample in samples],
    )


def _draw_accuracies(
    path: Path, comparison: Comparison, results: Sequence[Result], network: str, epochs: int
) -> None:
    title = f"{network}: {comparison.about}"
    parts = ("train", "test")
    figure, row_of_axes = panels(title, ["training accuracy, %", "test accuracy, %"])
    for part, axes in zip(parts, row_of_axes, strict=True):
        for row in comparison.rows:
            curve = mean_curve(of_row(results, row), _accuracy(part, epochs))
            _draw_curve(axes, row, *curve)
        if comparison.share == 1:
            _leave_out_the_climb(axes, epochs)
    row_of_axes[-1].legend(loc="lower right", fontsize="small")
    save(figure, path)


def _accuracy(part: str, epochs: int) -> Values:
    return lambda record: record[f"{part}_accuracy"] if record["epoch"] <= epochs else None


def _draw_curve(
    axes: Any,
    row: Row,
    epochs: Sequence[int],
    means: Sequence[float],
    deviations: Sequence[float],
    counts: Sequence[int],
) -> None:
    if not epochs:
        return
    least, most = min(counts), max(counts)
    n = f"{most}" if least == most else f"{least} to {most}"
    colour = _COLOURS[row]
    marker = "." if len(epochs) <= 20 else ""
    axes.plot(epochs, means, marker=marker, color=colour, label=f"{row.title} (n = {n})")
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


def _leave_out_the_climb(axes: Any, epochs: int) -> None:
    """Let the panel begin at the least mean after the first fifth of the epochs."""
    points = [point for line in axes.lines for point in line.get_xydata().tolist()]
    heights = [height for epoch, height in points if epoch > epochs / 5]
    if heights:
        axes.set_ylim(bottom=min(heights) - 1)


def _draw_filters(path: Path, results: Sequence[Result], network: str) -> bool:
    rows = [row for row in (_CZMIG, BATCHNORM) if of_row(results, row)]
    if not rows:
        return False
    title = f"{network}: filters under LUMA, and under weight decay with BatchNorm"
    quantities = ["filter magnitude ‖V‖, median and 5 to 95 %", "below 0.1 of the median, %"]
    figure, (magnitudes, shares) = panels(title, quantities)
    for row in rows:
        runs = of_row(results, row)
        epochs, *_ = mean_curve(runs, _norm("p50"))
        low, median, high = (mean_curve(runs, _norm(name))[1] for name in ("p05", "p50", "p95"))
        magnitudes.plot(epochs, median, color=_COLOURS[row], label=row.title)
        magnitudes.fill_between(epochs, low, high, color=_COLOURS[row], alpha=0.2, linewidth=0)
        _draw_curve(shares, row, *mean_curve(runs, _percent_collapsed))
    if not shares.lines:
        shares.text(0.5, 0.5, "not logged", transform=shares.transAxes, ha="center")
    magnitudes.set_ylim(bottom=0)
    magnitudes.legend(fontsize="small")
    save(figure, path)
    return True


def _norm(quantile: str) -> Values:
    return lambda record: record["filter_norms"][quantile]


def _percent_collapsed(record: dict[str, Any]) -> float | None:
    share = record.get("collapsed_filters")
    return None if share is None else 100 * share


def _draw_rejection(path: Path, results: Sequence[Result], network: str) -> bool:
    logged = [run for run in results if any(map(_rejection, run.history))]
    if not logged:
        return False
    title = f"{network}: common-mode rejection"
    figure, (over_epochs, over_layers) = panels(
        title, ["median of the layers, dB", "of a layer, dB"]
    )
    numbers: dict[str, int] = {}
    for row in TABLE1:
        if runs := of_row(logged, row):
            _draw_curve(over_epochs, row, *mean_curve(runs, _median_rejection))
            by_layer = _last_rejection(runs)
            places = [numbers.setdefault(layer, len(numbers) + 1) for layer in by_layer]
            over_layers.plot(places, list(by_layer.values()), ".", color=_COLOURS[row])
    over_layers.set_xlabel("layer, after the last logged epoch")
    over_epochs.legend(fontsize="small")
    save(figure, path)
    return True


def _rejection(record: dict[str, Any]) -> dict[str, float]:
    logged: dict[str, float] = record.get("rejection_db", {})
    return logged


def _median_rejection(record: dict[str, Any]) -> float | None:
    import numpy as np

    values = list(_rejection(record).values())
    return float(np.median(values)) if values else None


def _last_rejection(runs: Sequence[Result]) -> dict[str, float]:
    """Return each layer's mean over the runs, of the last epoch where it was logged."""
    last: dict[str, dict[Path, float]] = {}
    for run in runs:
        for record in run.history:
            for layer, value in _rejection(record).items():
                last.setdefault(layer, {})[run.folder] = value
    return {layer: sum(values.values()) / len(values) for layer, values in last.items()}
