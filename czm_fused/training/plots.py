"""The pictures of a run, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import replacing


def name_network(settings: Mapping[str, Any]) -> str:
    """Return what was trained and tested, for titles."""
    held = settings.get("hold_out")
    tested = f" ({held} training images held out as the test)" if held else ""
    return f"ResNet{settings['depth']} on {settings['dataset']}{tested}"


def plot_accuracy(path: Path, history: Sequence[dict[str, Any]], *, title: str) -> None:
    """Draw training and test accuracy over the epochs into the PNG file `path`.

    Args:
        history: the run's metrics, one record an epoch.
    """
    figure, (axes,) = panels(title, ["accuracy, %"])
    epochs = [record["epoch"] for record in history]
    for part in ("train", "test"):
        axes.plot(epochs, [record[f"{part}_accuracy"] for record in history], ".-", label=part)
    last = history[-1]
    axes.annotate(
        f"{last['test_accuracy']:.2f} %",
        (last["epoch"], last["test_accuracy"]),
        xytext=(-4, -14),
        textcoords="offset points",
        horizontalalignment="right",
    )
    axes.legend(loc="lower right")
    save(figure, path)


def plot_filters(path: Path, history: Sequence[dict[str, Any]], *, title: str) -> None:
    """Draw the percentiles of the filters' norms ‖V‖ over the epochs into the PNG file `path`.

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
    labels = ("all", "5 to 95 %", "25 to 75 %")
    for (low, high, alpha), label in zip(bands, labels, strict=True):
        axes.fill_between(
            epochs, norms[low], norms[high], alpha=alpha, color="C0", linewidth=0, label=label
        )
    axes.plot(epochs, norms["p50"], ".-", color="C0", label="median")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    save(figure, path)


def panels(title: str, quantities: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return a figure with a panel over the epochs for each quantity, and the panels' axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if len(quantities) == 1 else 6 * len(quantities), 4.2))
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    row = list(figure.subplots(1, len(quantities), squeeze=False)[0])
    for axes, quantity in zip(row, quantities, strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
    return figure, row


def save(figure: Any, path: Path) -> None:
    """Write `figure` into the PNG file `path`.

    Raises:
        TrainingError: the file cannot be written.
    """
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
