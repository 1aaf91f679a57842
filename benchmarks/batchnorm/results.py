"""The table on the terminal, and the chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from czm_fused.text import format_table

KEYS = ("model", "method", "device", "dtype", "batch", "metric", "value", "unit")

Row = dict[str, Any]

_HEADERS = {
    "saved_bytes": "saved MB",
    "operators": "operators",
    "forward": "forward ms",
    "backward": "backward ms",
    "optimizer": "optimizer ms",
    "step": "step ms",
    "inference": "inference ms",
}
_PHASES = ("forward", "backward", "optimizer")


def by_method(rows: Sequence[Row], model: str) -> dict[str, dict[str, float]]:
    """Return the values of one model: by method, then by metric."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] == model:
            values.setdefault(row["method"], {})[row["metric"]] = row["value"]
    return values


def table(rows: Sequence[Row], model: str) -> str:
    """Lay the values of one model out in columns, with their shares of BatchNorm's."""
    values = by_method(rows, model)
    baseline = values.get("batchnorm", {})
    metrics = [name for name in _HEADERS if any(name in each for each in values.values())]
    shared = [name for name in ("saved_bytes", "step") if name in baseline]
    header = ["method", *(_HEADERS[name] for name in metrics)]
    header += [f"{_HEADERS[name].rpartition(' ')[0]} / batchnorm" for name in shared]
    cells = [header]
    for method, each in values.items():
        line = [method, *(_format(name, each.get(name)) for name in metrics)]
        line += [_ratio(each.get(name), baseline[name]) for name in shared]
        cells.append(line)
    return format_table(cells, right_aligned=range(1, len(header)))


def _format(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    if metric == "operators":
        return f"{value:d}"
    return f"{value / 1e6:.3f}" if metric == "saved_bytes" else f"{value / 1e3:.2f}"


def _ratio(value: float | None, baseline: float) -> str:
    return "-" if value is None else f"{value / baseline:.3f}"


def plot(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """Draw bytes saved for backward and the times of a step, a line of panels a model, as a PNG."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    timed = any(row["metric"] == "step" for row in rows)
    height = 0.9 + sum(1.2 + 0.28 * len(by_method(rows, model)) for model in models)
    figure = Figure(figsize=(12 if timed else 7, height), layout="constrained")
    panels = figure.subplots(len(models), 2 if timed else 1, squeeze=False)
    for line, model in zip(panels, models, strict=True):
        values = by_method(rows, model)
        batch = next(row["batch"] for row in rows if row["model"] == model)
        line[0].set_title(f"{model}, batch {batch}", loc="left")
        _draw_saved(line[0], values)
        if timed:
            _draw_times(line[1], values)
    figure.suptitle(
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, "
        f"commit {facts['commit']}",
        fontsize="small",
    )
    figure.savefig(path, format="png", dpi=150)


def _draw_saved(axes: Any, values: dict[str, dict[str, float]]) -> None:
    methods = list(values)[::-1]
    megabytes = [values[method]["saved_bytes"] / 1e6 for method in methods]
    bars = axes.barh(methods, megabytes, color=[_color(method) for method in methods])
    _label(axes, bars, values, methods, "saved_bytes")
    floor = next(iter(values.values()))["floor_bytes"] / 1e6
    axes.axvline(floor, color="0.2", linestyle="--", linewidth=1, label="floor of the architecture")
    axes.legend(fontsize="x-small", loc="lower right")
    axes.set_xlabel("MB saved for backward (labels: share of BatchNorm's)")
    axes.margins(x=0.15)


def _draw_times(axes: Any, values: dict[str, dict[str, float]]) -> None:
    methods = list(values)[::-1]
    left = [0.0] * len(methods)
    for phase, color in zip(_PHASES, ("C0", "C9", "C3"), strict=True):
        times = [values[method][phase] / 1e3 for method in methods]
        bars = axes.barh(methods, times, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, times, strict=True)]
    _label(axes, bars, values, methods, "step")
    axes.legend(fontsize="x-small", loc="lower right")
    axes.set_xlabel("milliseconds (medians; labels: whole step, share of BatchNorm's)")
    axes.margins(x=0.15)


def _label(
    axes: Any, bars: Any, values: dict[str, dict[str, float]], methods: Sequence[str], metric: str
) -> None:
    if "batchnorm" in values:
        baseline = values["batchnorm"][metric]
        labels = [f" {values[method][metric] / baseline:.2f}" for method in methods]
        axes.bar_label(bars, labels, padding=2, fontsize="small")


def _color(method: str) -> str:
    return "C1" if method.startswith("czm") else "C0"
