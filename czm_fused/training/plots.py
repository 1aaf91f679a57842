"""The plots of a run, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import replacing

MARKED_EPOCHS = 20
"""Curves of so many epochs or fewer have a marker an epoch."""


def name_network(config: dict[str, Any]) -> str:
    """Return the network and the data of a run, for titles."""
    held = config.get("hold_out")
    tested = f" ({held} training images held out as the test)" if held else ""
    return f"ResNet{config['depth']} on {config['dataset']}{tested}"


def plot_accuracy(path: Path, history: Sequence[dict[str, Any]], *, title: str) -> None:
    """Draw training and test accuracy over the epochs into `path`.

    Args:
        history: the run's metrics, one record an epoch.
    """
    figure, (axes,) = panels(title, ["accuracy, %"])
    epochs = [record["epoch"] for record in history]
    for part, label in (("train", "training"), ("test", "test")):
        if f"{part}_accuracy" in history[-1]:
            values = [record[f"{part}_accuracy"] for record in history]
            axes.plot(epochs, values, marker_of(epochs), label=f"{label}, last {values[-1]:.2f} %")
    axes.set_ylim(max(0.0, axes.get_ylim()[0]), min(101.0, axes.get_ylim()[1]))
    finish(figure, [axes], epochs, path)


def plot_filters(path: Path, history: Sequence[dict[str, Any]], *, title: str) -> None:
    """Draw the percentiles of the filters' norms ‖V‖ over the epochs into `path`.

    Args:
        history: the run's metrics, one record an epoch.
    """
    figure, (axes,) = panels(title, ["filter magnitude ‖V‖"])
    epochs = [record["epoch"] for record in history]
    norms = {
        name: [record["filter_norms"][name] for record in history]
        for name in history[0]["filter_norms"]
    }
    bands = (("min", "max", 0.12), ("p05", "p95", 0.2), ("p25", "p75", 0.35))
    labels = ("all filters", "5 to 95 % of them", "25 to 75 %")
    for (low, high, alpha), label in zip(bands, labels, strict=True):
        fill(axes, epochs, norms[low], norms[high], alpha=alpha, color="C0", label=label)
    axes.plot(epochs, norms["p50"], marker_of(epochs), color="C0", label="median")
    axes.set_ylim(bottom=0)
    finish(figure, [axes], epochs, path)


def panels(title: str, quantities: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return a figure with a panel over the epochs for each quantity, and the panels' axes."""
    from matplotlib.figure import Figure

    width = 7.0 if len(quantities) == 1 else 6.0 * len(quantities)
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium", wrap=True)
    row = list(figure.subplots(1, len(quantities), squeeze=False)[0])
    for axes, quantity in zip(row, quantities, strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
    return figure, row


def fill(
    axes: Any, epochs: Sequence[float], low: Sequence[float], high: Sequence[float], **style: Any
) -> None:
    """Fill the band between `low` and `high`; that of one epoch gets the width of its marker."""
    if len(epochs) == 1:
        epochs, low, high = [epochs[0] - 0.1, epochs[0] + 0.1], [*low] * 2, [*high] * 2
    axes.fill_between(epochs, low, high, linewidth=0, **style)


def marker_of(epochs: Sequence[int]) -> str:
    """Return the style of a curve over `epochs`: with markers where there are few."""
    return ".-" if len(epochs) <= MARKED_EPOCHS else "-"


def finish(
    figure: Any, epoch_axes: Sequence[Any], epochs: Sequence[int], path: Path, columns: int = 4
) -> None:
    """Give the panels whole epochs, put one legend below them, and write the figure into `path`.

    Args:
        epoch_axes: the panels over epochs.
        epochs: the union of what they show.
        path: its suffix chooses PNG, SVG or PDF.
        columns: of the legend.

    Raises:
        TrainingError: the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    for axes in epoch_axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(set(epochs)) == 1:
            axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
            axes.set_xticks([epochs[0]])
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False,
            fontsize="small",
        )  # fmt: skip
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)
