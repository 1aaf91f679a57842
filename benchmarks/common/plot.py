"""The pictures of all benchmarks: bars or points, curves, and one metric against another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import shown_in

if TYPE_CHECKING:
    import pandas as pd

OURS, OTHERS = "#d95f02", "#7a8aa0"
# Above this ratio of the largest to the smallest, bars from zero would show the largest alone.
_LARGEST_RATIO = 15


def compare(
    frame: pd.DataFrame,
    path: Path,
    metrics: Sequence[str],
    baseline: str | None = None,
    label: Sequence[str] = ("provider",),
    titles: dict[str, str] | None = None,
    ours: str = "czm",
) -> None:
    """Draw a line of panels for each model, one for each metric that it has.

    Bars of medians from zero, or, where they differ by orders of magnitude, points on a logarithmic
    axis; whiskers from the 20th to the 80th percentile; beside each, its share of the baseline's.

    Args:
        frame: rows as `rows.frame` makes them, one for each label, model and metric.
        path: .png, .svg or .pdf.
        metrics: what to draw; a metric without a row in any model is left out.
        baseline: the provider that the numbers beside the bars are relative to.
        label: the columns that name a bar.
        titles: what an axis is called, by metric.
        ours: how the names of the providers that are coloured begin.
    """
    frame = frame[frame["p50"].notna() & frame["metric"].isin(metrics)]
    metrics = [each for each in metrics if (frame["metric"] == each).any()]
    models = list(frame["model"].unique())
    rows = [frame[frame["model"] == model][list(label)].drop_duplicates() for model in models]
    figure = _figure(
        figsize=(0.5 + 5.4 * len(metrics), 0.9 + sum(0.9 + 0.3 * len(each) for each in rows))
    )
    wide = {metric for metric in metrics if _is_wide(frame[frame["metric"] == metric])}
    heights = [0.9 + 0.3 * len(each) for each in rows]
    grid = figure.subplots(
        len(models), len(metrics), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, model in zip(grid, models, strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            part = frame[(frame["model"] == model) & (frame["metric"] == metric)]
            if part.empty:
                axes.remove()
                continue
            _draw(axes, part.iloc[::-1], baseline, label, ours, metric in wide)
            unit, _ = shown_in(part["unit"].iloc[0])
            axes.set_xlabel(f"{(titles or {}).get(metric, metric)}, {unit}")
            axes.set_title(model, loc="left", fontsize="medium")
    note = f"beside each: its share of {baseline}'s" if baseline else ""
    _save(figure, frame, path, note)


def _is_wide(rows: pd.DataFrame) -> bool:
    """Return True if the medians of a model differ by more than bars can show.

    Of bytes they never do: a bar that almost vanishes is the finding.
    """
    medians = rows.groupby("model")["p50"]
    smallest, largest = medians.min(), medians.max()
    ratio = _LARGEST_RATIO * smallest
    are_bytes = rows["unit"].iloc[0] == "bytes"
    return bool((smallest > 0).all() and (largest > ratio).any() and not are_bytes)


def _draw(
    axes: Any, part: pd.DataFrame, baseline: str | None, label: Sequence[str], ours: str,
    is_wide: bool,
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    _, divisor = shown_in(part["unit"].iloc[0])
    names = [", ".join(str(row[each]) for each in label if row[each] == row[each] and row[each])
             for _, row in part.iterrows()]  # fmt: skip
    places = range(len(names))
    # Rows that were written before percentiles were have none.
    middle, low, high = (
        part[each].astype(float).fillna(part["p50"]).to_numpy() / divisor
        for each in ("p50", "p20", "p80")
    )
    colors = [OURS if name.startswith(ours) else OTHERS for name in part["provider"]]
    whiskers = {"xerr": [middle - low, high - middle], "ecolor": "0.25"}
    if is_wide:
        axes.errorbar(middle, places, fmt="none", zorder=1, **whiskers)
        axes.scatter(middle, places, color=colors, zorder=2)
        axes.set_xscale("log")
        decades = (1,) if middle.max() > 200 * middle.min() else (1, 2, 5)
        axes.xaxis.set_major_locator(LogLocator(subs=decades))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlim(middle.min() / 1.6, high.max() * 4)
    else:
        axes.barh(places, middle, color=colors, **whiskers)
        axes.set_xlim(0, 1.22 * max(high.max(), middle.max()) or 1)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    base = part.loc[part["provider"] == baseline, "p50"].to_numpy()
    if len(base):
        for place, share, end in zip(places, part["p50"] / base[0], high, strict=True):
            axes.annotate(
                f"{share:.2f}" if 0.01 <= share < 100 else f"{share:.3g}", (end, place), (6, 0),
                textcoords="offset points", va="center", fontsize="small",
            )  # fmt: skip


def curves(frame: pd.DataFrame, path: Path, x: str, hue: str, y: str) -> None:
    """Draw the medians of the rows against the column `x`, a line for each value of `hue`.

    Args:
        frame: rows as `rows.frame` makes them, of one metric.
        path: .png, .svg or .pdf.
        x: a column, such as the step.
        hue: the column that tells the lines apart.
        y: what the vertical axis is called.
    """
    import seaborn

    figure = _figure(figsize=(8, 4))
    axes = figure.subplots()
    # Lines that coincide show beneath each other.
    widths = {name: 6 / (number + 1) for number, name in enumerate(frame[hue].unique())}
    seaborn.lineplot(
        frame, x=x, y="p50", hue=hue, style=hue, size=hue, sizes=widths, errorbar=None, ax=axes
    )
    axes.set(xlabel=x, ylabel=y)
    _legend_outside(axes)
    _save(figure, frame, path)


def tradeoff(
    frame: pd.DataFrame, path: Path, x: str, y: str, titles: dict[str, str] | None = None
) -> None:
    """Draw one metric against another, a point for each provider and a panel for each model.

    Args:
        frame: rows as `rows.frame` makes them; a provider without both metrics is left out.
        path: .png, .svg or .pdf.
        x: the metric of the horizontal axis, from zero.
        y: the metric of the vertical axis, with whiskers from its 20th to its 80th percentile.
        titles: what an axis is called, by metric.
    """
    import seaborn

    frame = frame[frame["p50"].notna()]
    points = frame[frame["metric"] == x].merge(
        frame[frame["metric"] == y], on=["model", "provider"], suffixes=("_x", "_y")
    )
    models = list(points["model"].unique())
    figure = _figure(figsize=(5 * len(models) + 2.5, 4.4))
    line = figure.subplots(1, len(models), squeeze=False)[0]
    providers = sorted(points["provider"].unique())
    for axes, model in zip(line, models, strict=True):
        part = points[points["model"] == model].copy()
        unit, divisor = shown_in(part["unit_x"].iloc[0])
        part["x"] = part["p50_x"] / divisor
        spread = [part["p50_y"] - part["p20_y"], part["p80_y"] - part["p50_y"]]
        axes.errorbar(part["x"], part["p50_y"], yerr=spread, fmt="none", ecolor="0.5", zorder=1)
        seaborn.scatterplot(
            part, x="x", y="p50_y", hue="provider", style="provider", hue_order=providers,
            style_order=providers, s=80, ax=axes, legend=axes is line[-1], zorder=2,
        )  # fmt: skip
        axes.set_xlim(0, 1.08 * part["x"].max())
        axes.margins(y=0.12)
        axes.set(
            xlabel=f"{(titles or {}).get(x, x)}, {unit}",
            ylabel=f"{(titles or {}).get(y, y)}, {part['unit_y'].iloc[0]}",
        )
        axes.set_title(model, loc="left", fontsize="medium")
    _legend_outside(line[-1])
    _save(figure, frame, path)


def _figure(figsize: tuple[float, float]) -> Any:
    # Without pyplot, which would choose a backend for the whole process.
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def _legend_outside(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _save(figure: Any, frame: pd.DataFrame, path: Path, note: str = "") -> None:
    facts = frame[["processor", "threads", "torch", "commit"]].drop_duplicates()
    machines = [
        f"{row.processor}, "
        # Rows that were written before the schema may lack it.
        + (f"{row.threads:.0f} threads, " if row.threads == row.threads and row.threads else "")
        + f"torch {row.torch}, commit {row.commit}"
        for row in facts.itertuples()
    ]
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join([*machines, *([note] if note else [])]), fontsize="small", x=0.5)
    figure.savefig(path, dpi=130)
