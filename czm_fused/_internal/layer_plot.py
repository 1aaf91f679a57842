"""Draw quantities over the layers of a network."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_NAMES = 40
"""The number of layers up to which their names can be read below the figure."""


class NotebookFigure(Figure):
    """A figure that a notebook shows even if nothing has imported pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def plot_layers(
    names: Sequence[str],
    panels: Mapping[str, Mapping[int, Any]],
    logarithmic: Collection[str],
) -> Figure:
    """Return a figure with one panel for each quantity of which anything is known.

    Args:
        names: of the layers, by their depth.
        panels: by the title of a panel, the value of each layer by its depth: a number, or an
            object with `median`, `min` and `max` over the filters.
        logarithmic: the titles of the panels with a logarithmic axis.
    """
    shown = {title: values for title, values in panels.items() if values}
    width = min(16.0, max(6.0, 0.25 * len(names)))
    figure = NotebookFigure(figsize=(width, 1.0 + 1.9 * len(shown)), layout="constrained")
    if not shown:
        return figure
    axes_of_panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    legend: tuple[list[Any], list[str]] = ([], [])
    for axes, (title, values) in zip(axes_of_panels, shown.items(), strict=True):
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
        spreads = {depth: value for depth, value in values.items() if hasattr(value, "median")}
        medians = [getattr(value, "median", value) for value in values.values()]
        points = axes.plot(list(values), medians, "o", markersize=4)
        if spreads:
            lows, highs = [v.min for v in spreads.values()], [v.max for v in spreads.values()]
            ranges = axes.vlines(list(spreads), lows, highs, alpha=0.4)
            legend = ([points[0], ranges], ["median of the filters", "range of the filters"])
        low, high = axes.dataLim.y0, axes.dataLim.y1
        if title in logarithmic and low > 0 and high > 10 * low:
            axes.set_yscale("log")
        elif high - low < 0.01 * abs(high):
            # Rounding errors would otherwise fill the panel.
            axes.set_ylim(low - 0.1 * abs(low), high + 0.1 * abs(high))
    figure.legend(*legend, loc="outside upper right", ncols=2, frameon=False)
    last = axes_of_panels[-1]
    last.set_xlim(-0.5, len(names) - 0.5)
    if len(names) <= MOST_NAMES:
        last.set_xticks(range(len(names)), [name or "(model)" for name in names], rotation=90)
    else:
        last.xaxis.set_major_locator(MaxNLocator(integer=True))
        last.set_xlabel("convolution, in the order of execution")
    return figure
