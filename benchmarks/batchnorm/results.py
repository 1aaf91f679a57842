"""The table on the terminal, and the chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from czm_fused._internal.text import format_table

KEYS = ("model", "method", "device", "dtype", "batch", "metric", "value", "unit")

Row = dict[str, Any]

# Of the table: what a column is called, and of how much of the row's unit.
_COLUMNS = {
    "saved_bytes": ("saved MB", 1e6),
    "peak_bytes": ("peak MB", 1e6),
    "operators": ("operators", 1),
    "collectives": ("collectives", 1),
    "collective_bytes": ("sent MB", 1e6),
    "forward": ("forward ms", 1e3),
    "backward": ("backward ms", 1e3),
    "optimizer": ("optimizer ms", 1e3),
    "step": ("step ms", 1e3),
    "inference": ("inference ms", 1e3),
    "largest_batch": ("largest batch", 1),
}
# Of these, the shares of BatchNorm's are columns too.
_SHARED = ("saved_bytes", "peak_bytes", "step")
_PHASES = ("forward", "backward", "optimizer")


def by_method(rows: Sequence[Row], model: str) -> dict[str, dict[str, float]]:
    """Return the values of one model: by method, then by metric."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] == model:
            values.setdefault(row["method"], {})[row["metric"]] = row["value"]
    return values


def describe(rows: Sequence[Row], image_size: int) -> str:
    """Say in a line what the rows of one model belong to, and its floor."""
    row = next(row for row in rows if row["metric"] == "floor_bytes")
    return (
        f"{row['model']}, batch {row['batch']}, {image_size} pixels, {row['dtype']}: the "
        f"architecture's floor is {row['value'] / 1e6:.3f} MB saved for backward"
    )


def table(rows: Sequence[Row], model: str) -> str:
    """Lay the values of one model out in columns, with their shares of BatchNorm's."""
    values = by_method(rows, model)
    baseline = values.get("batchnorm", {})
    metrics = [name for name in _COLUMNS if any(name in each for each in values.values())]
    shared = [name for name in _SHARED if name in baseline]
    header = ["method", *(_COLUMNS[name][0] for name in metrics)]
    header += [f"{_COLUMNS[name][0].rpartition(' ')[0]} / batchnorm" for name in shared]
    cells = [header]
    for method, each in values.items():
        line = [method, *(_format(name, each.get(name)) for name in metrics)]
        line += [_ratio(each.get(name), baseline[name]) for name in shared]
        cells.append(line)
    return format_table(cells, right_aligned=range(1, len(header)))


def _format(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    divisor = _COLUMNS[metric][1]
    if divisor == 1:
        return f"{value:d}"
    return f"{value / divisor:.{3 if divisor == 1e6 else 2}f}"


def _ratio(value: float | None, baseline: float) -> str:
    return "-" if value is None else f"{value / baseline:.3f}"


def plot(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """Draw memory and the times of a step, a line of panels a model, as a PNG."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    timed = any(row["metric"] == "step" for row in rows)
    height = 0.9 + sum(1.2 + 0.28 * len(_measured(rows, model)) for model in models)
    figure = Figure(figsize=(16 if timed else 11, height), layout="constrained")
    panels = figure.subplots(len(models), 3 if timed else 2, squeeze=False, sharey="row")
    for line, model in zip(panels, models, strict=True):
        values = _measured(rows, model)
        row = next(row for row in rows if row["model"] == model)
        line[0].set_title(f"{model}, batch {row['batch']}, {row['dtype']}", loc="left")
        _draw_bytes(line[0], values, "saved_bytes", "MB saved for backward")
        floor = next(iter(values.values()))["floor_bytes"] / 1e6
        line[0].axvline(floor, color="0.2", linestyle="--", linewidth=1)
        line[0].set_xlabel("MB saved for backward (dashed: floor of the architecture)")
        _draw_bytes(line[1], values, "peak_bytes", "MB at the peak of a step")
        if timed:
            _draw_times(line[2], values)
    figure.suptitle(
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, "
        f"commit {facts['commit']}; labels: share of BatchNorm's; orange: CZM",
        fontsize="small",
    )
    figure.savefig(path, format="png", dpi=110)


def _measured(rows: Sequence[Row], model: str) -> dict[str, dict[str, float]]:
    """Return the values by method, from the bottom of a chart up, without what is only counted."""
    values = by_method(rows, model)
    return {m: values[m] for m in reversed(values) if "saved_bytes" in values[m]}


def _draw_bytes(axes: Any, values: dict[str, dict[str, float]], metric: str, title: str) -> None:
    megabytes = [each[metric] / 1e6 for each in values.values()]
    colors = ["C1" if method.startswith("czm") else "C0" for method in values]
    bars = axes.barh(list(values), megabytes, color=colors)
    _label(axes, bars, values, metric)
    axes.set_xlabel(title)


def _draw_times(axes: Any, values: dict[str, dict[str, float]]) -> None:
    left = [0.0] * len(values)
    for phase, color in zip(_PHASES, ("0.35", "0.6", "0.85"), strict=True):
        times = [each[phase] / 1e3 for each in values.values()]
        bars = axes.barh(list(values), times, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, times, strict=True)]
    _label(axes, bars, values, "step")
    axes.legend(fontsize="x-small", loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    axes.set_xlabel("milliseconds of a step (medians)")


def _label(axes: Any, bars: Any, values: dict[str, dict[str, float]], metric: str) -> None:
    axes.margins(x=0.15)
    if "batchnorm" in values:
        baseline = values["batchnorm"][metric]
        labels = [f" {each[metric] / baseline:.2f}" for each in values.values()]
        axes.bar_label(bars, labels, padding=2, fontsize="small")
