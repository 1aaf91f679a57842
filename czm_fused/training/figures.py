"""`czm-train figures`: the paper's figures 1 to 5, the filters' magnitudes and the rejection."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import checkpoint, metrics
from .cli import read
from .config import LOCAL, METHOD_DEFAULTS, WITHOUT_EFFECT, PlotFormat, difference
from .errors import TrainingError, explained
from .plots import MAGNITUDE, curves, name_network, panels, spread
from .run import SUMMARY
from .table1 import BATCHNORM, ROWS, TABLE1

_CZMIG = "czmig-lr0.4-zmg0.85-noise0.1"
_PARTS = (_CZMIG, "czmig-lr0.4-zmg0.85-noise0", "czmi-lr0.4-noise0.1", "czmi-lr0.4-noise0")
# Subject, and rows in the order of the legend beside BatchNorm's, which is in all of them.
COMPARISONS = {
    "figure1": ("zero-mean gradients and noise, one at a time", _PARTS),
    "figure2": (
        "learning rates of zero-mean initialisation alone",
        [f"czmi-lr{lr}-noise0" for lr in (0.1, 0.2, 0.4)],
    ),
    "figure3": (
        "learning rates with zero-mean gradients",
        [f"czmig-lr{lr}-zmg0.85-noise0" for lr in (0.1, 0.2, 0.4)],
    ),
    "figure4": (
        "shares of the gradient's mean that are removed (CZMI: zmg 0)",
        [
            "czmi-lr0.4-noise0.1",
            _CZMIG,
            "czmig-lr0.4-zmg0.98-noise0.1",
            "czmig-lr0.1-zmg1-noise0.1",
        ],
    ),
    "figure5": ("the first tenth of the epochs", _PARTS),
}
_NOTE = "ranges: one standard deviation over the seeds"
_COLOURS = {name: f"C{i}" for i, name in enumerate(name for name in ROWS if name[:2] != "bn")}
_COLOURS[BATCHNORM.name] = "black"
# Options of which each method has its own.
_OF_METHODS = {*METHOD_DEFAULTS["czmig"], *WITHOUT_EFFECT["bn"], "method", "noise_on"}
_MAY_DIFFER = {*LOCAL, "seed", "seconds", "train_accuracy", "test_accuracy"}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Draw accuracy over the epochs, filter magnitudes and common-mode rejection of the runs of
    Table 1's rows under a folder; bands are one standard deviation over the seeds."""

    folder: str = "runs/table1"
    """Of table1, or of several runs of czm-train."""
    out: str | None = None
    """Folder of the figures (default: figures in --folder)."""
    plot_format: PlotFormat = "png"
    """File format of the figures."""


def main(arguments: Sequence[str]) -> None:
    """Draw the figures of the runs in a folder, and print the names of their files."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--folder", *arguments]
    options: Figures = read(Figures, arguments, "czm-train figures")
    out = Path(options.out or Path(options.folder, "figures"))
    for path in draw(Path(options.folder), out, options.plot_format):
        print(path)


def draw(folder: Path, out: Path, suffix: str = "png") -> list[Path]:
    """Draw the figures that the runs under `folder` have rows for; return their files in `out`."""
    frame, options = read_runs(folder)
    out.mkdir(parents=True, exist_ok=True)
    counts = frame.groupby("row")["folder"].nunique()
    labels = {row: f"{ROWS[row].title} (n = {counts[row]})" for row in ROWS if row in counts}
    frame["label"] = frame["row"].map(labels)
    style = {"palette": {label: _COLOURS[row] for row, label in labels.items()}}
    note = _NOTE if counts.max() > 1 else ""
    drawn = []

    def figure(name: str, about: str, quantities: Sequence[str], note: str = note) -> Any:
        drawn.append(out / f"{name}.{suffix}")
        return panels(drawn[-1], f"{name_network(options)}: {about}", quantities, note)

    for name, (about, rows) in COMPARISONS.items():
        if not any(row in labels for row in rows):
            continue
        order = [labels[row] for row in (BATCHNORM.name, *rows) if row in labels]
        part = frame[frame["label"].isin(order)]
        if name == "figure5":
            part = part[part["epoch"] <= max(1, round(options["epochs"] / 10))]
        with figure(name, about, ["training accuracy, %", "test accuracy, %"]) as row_of_axes:
            for axes, value in zip(row_of_axes, ("train_accuracy", "test_accuracy"), strict=True):
                curves(axes, part, value, hue_order=order, **style)
                late = part[part["epoch"] > part["epoch"].max() / 5]
                if name != "figure5" and len(late):
                    # The climb of the first epochs would leave no room for the differences.
                    axes.set_ylim(late.groupby(["label", "epoch"])[value].mean().min() - 1)

    norms = frame[frame["row"].isin([_CZMIG, BATCHNORM.name])].dropna(subset="filter_norms.p50")
    if len(norms):
        about = "filters under LUMA, and under weight decay with BatchNorm"
        shares = ["filters below 0.1 of the median, %"] * bool(norms["collapsed"].max() > 0)
        what = "ranges: 5 to 95 % of the filters"
        with figure("filters", about, [MAGNITUDE, *shares], what) as row_of_axes:
            spread(row_of_axes[0], norms, ("p05", "p95"), 0.2, **style)
            for axes in row_of_axes[1:]:
                curves(axes, norms, "collapsed", **style)

    logged = frame.dropna(subset="rejection")
    if len(logged):
        about = "common-mode rejection (dB of mean shift that a layer removes)"
        with figure("rejection", about, ["median of the layers, dB", "layer, dB"]) as row_of_axes:
            curves(row_of_axes[0], logged, "rejection", **style)
            # A layer's place is its order in the network: with BatchNorm, names are other ones.
            layers = logged.groupby("folder").tail(1).set_index("label").filter(like="layer ")
            long = layers.melt(var_name="layer", value_name="dB", ignore_index=False)
            long["layer"] = long["layer"].str.removeprefix("layer ").astype(int)
            mean = long.dropna().groupby(["label", "layer"])["dB"].mean().reset_index()
            for label, own in mean.groupby("label"):
                row_of_axes[1].plot(own["layer"], own["dB"], "o", color=style["palette"][label])
            row_of_axes[1].set_xlabel("layer, in the order of the network, after the last epoch")
    return drawn


def read_runs(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the records of the runs of Table 1's rows under `folder`, and the options of one.

    Runs of other options, and of the user's own networks, are passed over. Raises TrainingError
    where there are none, or they differ in more than row and seed.
    """
    frames: dict[tuple[str, int], pd.DataFrame] = {}
    firsts: dict[str, dict[str, Any]] = {}
    for log in sorted(folder.rglob(metrics.FILE_NAME)):
        run = log.parent
        with explained(f"cannot read the run in {run}"):
            history = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
            if (run / SUMMARY).exists():
                options = json.loads((run / SUMMARY).read_text("utf-8"))
            else:
                saved = checkpoint.load(run)
                options = {**saved["config"], "network": saved.get("network")}
            key = next((row.name for row in TABLE1 if row.trained(options)), ""), options["seed"]
            frame = pd.json_normalize(history)
        if not key[0] or not history or options.get("network"):
            continue
        for first, ignored in (
            (firsts.setdefault(key[0], options), _MAY_DIFFER),
            (next(iter(firsts.values())), _MAY_DIFFER | _OF_METHODS),
        ):
            if found := difference(first, options, ignored):
                raise TrainingError(f"{run} cannot be compared with the others: {found}")
        if key in frames:
            raise TrainingError(f"{frames[key]['folder'][0]} and {run} hold the same run")
        layers = frame.filter(like="rejection_db.")
        frame = frame.assign(row=key[0], folder=str(run), rejection=layers.median(axis=1))
        frame["collapsed"] = 100 * frame.get("collapsed_filters", float("nan"))
        names = [f"layer {number}" for number in range(1, layers.shape[1] + 1)]
        frames[key] = frame.join(layers.set_axis(names, axis=1))
    if not frames:
        raise TrainingError(f"there is no run of a row of Table 1 under {folder}")
    return pd.concat(frames.values(), ignore_index=True), next(iter(firsts.values()))
