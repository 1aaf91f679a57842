"""The style of all plots, and those of one run."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import replacing

if TYPE_CHECKING:
    import pandas as pd

MAGNITUDE = "filter magnitude ‖V‖"
_BANDS = {0.1: ("min", "max"), 0.2: ("p05", "p95"), 0.35: ("p25", "p75")}


def name_network(config: Mapping[str, Any]) -> str:
    """Return the network and the data of a run, for titles."""
    held = config.get("hold_out")
    tested = f" ({held} training images held out as the test)" if held else ""
    return f"ResNet{config['depth']} on {config['dataset']}{tested}"


def draw_run(folder: Path, suffix: str, history: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the accuracies and the filters' norms ‖V‖ of a run over its epochs into `folder`."""
    import pandas as pd

    frame = pd.json_normalize(list(history))
    parts = {
        f"{label}, last {frame[name].iloc[-1]:.2f} %": frame[["epoch"]].assign(value=frame[name])
        for name, label in (("train_accuracy", "training"), ("test_accuracy", "test"))
        if name in frame
    }
    with panels(folder / f"accuracy.{suffix}", title, ["accuracy, %"]) as (axes,):
        curves(axes, pd.concat(parts, names=["label"]).reset_index("label"), "value")
    if "filter_norms" not in history[0]:
        return
    note = "ranges: all filters, 5 to 95 % and 25 to 75 % of them"
    with panels(folder / f"filters.{suffix}", title, [MAGNITUDE], note) as (axes,):
        for alpha, ends in _BANDS.items():
            spread(axes, frame.assign(label="median"), ends, alpha=alpha)


def spread(axes: Any, frame: pd.DataFrame, ends: Sequence[str], alpha: float, **style: Any) -> None:
    """Draw the median norm and a band between two quantiles of it, as columns of records."""
    columns = [f"filter_norms.{name}" for name in (ends[0], "p50", ends[1])]
    long = frame.melt(["epoch", "label"], columns, value_name="norm")
    style = {"estimator": "median", "errorbar": ("pi", 100), **style}
    curves(axes, long, "norm", err_kws={"alpha": alpha}, **style)


def curves(axes: Any, frame: pd.DataFrame, quantity: str, **style: Any) -> None:
    """Draw `quantity` over the epochs, a curve a label: by default mean and deviation of runs."""
    import seaborn as sns

    epochs = frame["epoch"].nunique()
    if epochs == 1:
        # A band of one epoch has no width, and bars in one place would hide each other.
        style = {**style, "err_style": "bars", "err_kws": {"capsize": 4}}
        (only,) = frame["epoch"].unique()
        axes.set(xticks=[only], xlim=(only - 0.5, only + 0.5))
        places = frame["label"].rank(method="dense")
        frame = frame.assign(epoch=only + 0.05 * (places - places.mean()))
    style = {"errorbar": "sd", "marker": "o" if epochs <= 20 else None, **style}
    sns.lineplot(frame, x="epoch", y=quantity, hue="label", ax=axes, **style)


@contextmanager
def panels(
    path: Path, title: str, quantities: Sequence[str], note: str = ""
) -> Iterator[list[Any]]:
    """Yield the axes of a panel for each quantity over the epochs; write the figure to `path`.

    One legend below the panels names the curves of the first and explains the bands by `note`.
    Percentages stay in their range, and magnitudes begin at zero.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = 7.0 if len(quantities) == 1 else 6.0 * len(quantities)
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    figure.suptitle(title, fontsize="medium", wrap=True)
    row = list(figure.subplots(1, len(quantities), squeeze=False)[0])
    for axes in row:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    yield row
    handles, labels = row[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    for axes, quantity in zip(row, quantities, strict=True):
        axes.set_ylabel(quantity)
        low, high = axes.get_ylim()
        if quantity.endswith("%"):
            axes.set_ylim(max(0.0, low), min(101.0, high))
        elif quantity == MAGNITUDE:
            axes.set_ylim(bottom=0)
        if axes.get_legend():
            axes.get_legend().remove()
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False,
        fontsize="small", title=note, title_fontsize="small",
    )  # fmt: skip
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)
