"""`czm-train figures`: the paper's figures 1 to 5, the filters' magnitudes and the rejection."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import checkpoint, metrics
from ..cli import read
from ..config import METHOD_DEFAULTS, Config, option
from ..errors import TrainingError, require
from ..plots import fill, finish, marker_of, name_network, panels
from ..run import SUMMARY
from .rows import BATCHNORM, LOCAL, ROW_OPTIONS, TABLE1, Row, find

if TYPE_CHECKING:
    import pandas as pd

_COLOURS = {row: f"C{i}" for i, row in enumerate(row for row in TABLE1 if row is not BATCHNORM)}
_COLOURS[BATCHNORM] = "black"

_CZMIG = find(["czmig-lr0.4-zmg0.85-noise0.1"])[0]
_PARTS = [
    BATCHNORM,
    *find(["czmig-lr0.4-zmg0.85-noise0.1", "czmig-lr0.4-zmg0.85-noise0"]),
    *find(["czmi-lr0.4-noise0.1", "czmi-lr0.4-noise0"]),
]
# Name, subject, rows in the order of the legend, and the share of the epochs, from the first.
COMPARISONS: tuple[tuple[str, str, Sequence[Row], float], ...] = (
    ("figure1", "zero-mean gradients and noise, one at a time", _PARTS, 1.0),
    (
        "figure2",
        "learning rates of zero-mean initialisation alone",
        [BATCHNORM, *find([f"czmi-lr{lr}-noise0" for lr in (0.1, 0.2, 0.4)])],
        1.0,
    ),
    (
        "figure3",
        "learning rates with zero-mean gradients",
        [BATCHNORM, *find([f"czmig-lr{lr}-zmg0.85-noise0" for lr in (0.1, 0.2, 0.4)])],
        1.0,
    ),
    (
        "figure4",
        "shares of the gradient's mean that are removed (CZMI: zmg 0)",
        [
            BATCHNORM,
            *find(["czmi-lr0.4-noise0.1", "czmig-lr0.4-zmg0.85-noise0.1"]),
            *find(["czmig-lr0.4-zmg0.98-noise0.1", "czmig-lr0.1-zmg1-noise0.1"]),
        ],
        1.0,
    ),
    ("figure5", "the first tenth of the epochs", _PARTS, 0.1),
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Draw accuracy over the epochs, filter magnitudes and common-mode rejection of the runs of
    Table 1's rows under a folder; bands are one standard deviation over the seeds."""

    folder: str = "runs/table1"
    """Of table1, or of several runs of czm-train."""
    out: str | None = None
    """Folder of the figures (default: figures in --folder)."""
    plot_format: Literal["png", "svg", "pdf"] = "png"
    """File format of the figures."""


@dataclass(frozen=True)
class Run:
    """A run of a row, as far as it has come."""

    row: Row
    folder: Path
    config: dict[str, Any]
    history: list[dict[str, Any]]


def main(arguments: Sequence[str]) -> None:
    """Draw the figures of the runs in a folder, and print the names of their files.

    Raises:
        TrainingError: there are no runs, or they cannot be compared.
        SystemExit: tyro's.
    """
    arguments = ["--folder", *arguments] if arguments and arguments[0][0] != "-" else arguments
    known = read(Figures, arguments, prog="czm-train figures")
    require("matplotlib", "pandas")
    folder = Path(known.folder)
    out = Path(known.out) if known.out else folder / "figures"
    for path in draw(folder, out, known.plot_format):
        print(path)


def draw(folder: Path, out: Path, suffix: str = "png") -> list[Path]:
    """Draw the figures that the runs under `folder` have rows for into `out`; return their files.

    BatchNorm's row is in every comparison, and is none alone.

    Raises:
        TrainingError: there are no runs of Table 1's rows, they cannot be compared, or the disk
            refuses.
    """
    runs = read_runs(folder)
    if not runs:
        raise TrainingError(f"there is no run of a row of Table 1 under {folder}")
    network = name_network(runs[0].config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot create --out {out}: {error}") from error
    frame = to_frame(runs)
    present = set(frame["row"])
    drawn = []
    for name, about, rows, share in COMPARISONS:
        shown = [row for row in rows if row.name in present]
        if any(row is not BATCHNORM for row in shown):
            drawn.append(out / f"{name}.{suffix}")
            epochs = max(1, round(share * runs[0].config["epochs"]))
            part = frame[frame["epoch"] <= epochs]
            _draw_accuracies(drawn[-1], f"{network}: {about}", part, shown, share == 1)
    for name, draw_one in (("filters", _draw_filters), ("rejection", _draw_rejection)):
        if draw_one(out / f"{name}.{suffix}", frame, runs, network):
            drawn.append(out / f"{name}.{suffix}")
    return drawn


def read_runs(folder: Path) -> list[Run]:
    """Return the runs of Table 1's rows anywhere under `folder` that have trained an epoch.

    Raises:
        TrainingError: the folder is missing, a file in it is damaged, or runs differ in more than
            their row and seed.
    """
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {folder}")
    found = []
    for log in sorted(folder.rglob(metrics.FILE_NAME)):
        if (log.parent / SUMMARY).exists():
            config, history = _read_complete(log.parent)
        elif (log.parent / checkpoint.FILE_NAME).exists():
            state = checkpoint.load(log.parent)
            config, history = state["config"], state["history"]
        else:
            continue
        rows = [row for row in TABLE1 if row.trained(config)]
        if rows and history:
            found.append(Run(rows[0], log.parent, config, history))
    seen: dict[tuple[str, int], Run] = {}
    for run in found:
        of_row = next(other for other in found if other.row is run.row)
        _check_alike(of_row, run)
        _check_alike(found[0], run, except_for=METHOD_DEFAULTS["bn"].keys() | _OF_METHODS)
        same = seen.setdefault((run.row.name, run.config["seed"]), run)
        if same is not run:
            raise TrainingError(f"{same.folder} and {run.folder} hold the same run: remove one")
    return found


_OF_METHODS = {"method", "residual_bias", "gain", "stem", "noise_on"}


def _read_complete(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        lines = (folder / metrics.FILE_NAME).read_text(encoding="utf-8").splitlines()
        config = {f.name: summary[f.name] for f in fields(Config) if f.name in summary}
        config["seed"], config["epochs"], config["depth"]
        return config, [json.loads(line) for line in lines]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainingError(f"cannot read the run in {folder}: {error!r}") from error


def _check_alike(first: Run, other: Run, except_for: Collection[str] = ()) -> None:
    for name in sorted(first.config.keys() | other.config.keys()):
        values = first.config.get(name), other.config.get(name)
        ignored = name in LOCAL or name == "seed" or name in except_for or name in ROW_OPTIONS
        if not ignored and values[0] != values[1]:
            raise TrainingError(
                f"{first.folder} and {other.folder} cannot be compared: "
                f"{option(name)} was {values[0]} and {values[1]}"
            )


def to_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a line for each run and epoch: row, seed, epoch, accuracies, norms, rejection."""
    import numpy as np
    import pandas as pd

    lines = []
    for run in runs:
        for record in run.history:
            rejections = [v for v in record.get("rejection_db", {}).values() if v is not None]
            lines.append(
                {
                    "row": run.row.name,
                    "seed": run.config["seed"],
                    "epoch": record["epoch"],
                    "training": record["train_accuracy"],
                    "test": record["test_accuracy"],
                    **record.get("filter_norms", {}),
                    "collapsed": 100 * record.get("collapsed_filters", np.nan),
                    "rejection": float(np.median(rejections)) if rejections else np.nan,
                }
            )
    return pd.DataFrame(lines)


def _draw_accuracies(
    path: Path, title: str, frame: pd.DataFrame, rows: Sequence[Row], leave_out_climb: bool
) -> None:
    figure, row_of_axes = panels(title, ["training accuracy, %", "test accuracy, %"])
    for part, axes in zip(("training", "test"), row_of_axes, strict=True):
        for row in rows:
            _draw_curve(axes, frame, row, part)
        low, high = axes.get_ylim()
        late = frame[frame["epoch"] > frame["epoch"].max() / 5]
        if leave_out_climb and len(late):
            low = late.groupby(["row", "epoch"])[part].mean().min() - 1
        axes.set_ylim(max(0.0, low), min(high, 101.0))
    finish(figure, row_of_axes, frame["epoch"].unique(), path, columns=2)


def _draw_curve(axes: Any, frame: pd.DataFrame, row: Row, quantity: str) -> None:
    """Draw the mean over the seeds, and a band of one standard deviation where there are some."""
    own = frame[frame["row"] == row.name].dropna(subset=[quantity]).groupby("epoch")[quantity]
    curve = own.agg(["mean", "std", "count"])
    if curve.empty:
        return
    least, most = curve["count"].min(), curve["count"].max()
    n = f"{most}" if least == most else f"{least} to {most}"
    band = ", band: sd" if most > 1 else ""
    epochs = list(curve.index)
    label = f"{row.title} (n = {n}{band})"
    axes.plot(epochs, curve["mean"], marker_of(epochs), color=_COLOURS[row], label=label)
    spread = curve["std"].fillna(0.0)
    if most > 1:
        low, high = curve["mean"] - spread, curve["mean"] + spread
        fill(axes, epochs, list(low), list(high), color=_COLOURS[row], alpha=0.2)


def _draw_filters(path: Path, frame: pd.DataFrame, runs: Sequence[Run], network: str) -> bool:
    rows = [row for row in (_CZMIG, BATCHNORM) if row.name in set(frame["row"])]
    if not rows or "p50" not in frame:
        return False
    quantities = ["filter magnitude ‖V‖"]
    if frame["collapsed"].notna().any():
        quantities.append("filters below 0.1 of the median, %")
    title = f"{network}: filters under LUMA, and under weight decay with BatchNorm"
    figure, axes = panels(title, quantities)
    for row in rows:
        mean = frame[frame["row"] == row.name].groupby("epoch")[["p05", "p50", "p95"]].mean()
        style = {"color": _COLOURS[row]}
        epochs = list(mean.index)
        axes[0].plot(epochs, mean["p50"], marker_of(epochs), label=f"{row.title}: median", **style)
        label = f"{row.title}: 5 to 95 %"
        fill(axes[0], epochs, list(mean["p05"]), list(mean["p95"]), alpha=0.2, label=label, **style)
        if len(axes) > 1:
            shares = frame[frame["row"] == row.name].groupby("epoch")["collapsed"].mean().dropna()
            axes[1].plot(list(shares.index), list(shares), marker_of(epochs), **style)
    for each in axes:
        each.set_ylim(bottom=0)
    finish(figure, axes, frame["epoch"].unique(), path, columns=2)
    return True


def _draw_rejection(path: Path, frame: pd.DataFrame, runs: Sequence[Run], network: str) -> bool:
    import pandas as pd

    logged = frame.dropna(subset=["rejection"])
    if logged.empty:
        return False
    title = f"{network}: common-mode rejection (dB of mean shift that a layer removes)"
    figure, (over_epochs, over_layers) = panels(title, ["median of the layers, dB", "layer, dB"])
    for row in TABLE1:
        if row.name not in set(logged["row"]):
            continue
        _draw_curve(over_epochs, logged, row, "rejection")
        # A layer's place is its order in the network: with BatchNorm, names are other ones.
        last = [
            [r["rejection_db"] for r in run.history if r.get("rejection_db")][-1]
            for run in runs
            if run.row is row and any(r.get("rejection_db") for r in run.history)
        ]
        layers = pd.DataFrame([list(each.values()) for each in last], dtype="float64").mean()
        over_layers.plot([i + 1 for i in layers.index], list(layers), ".", color=_COLOURS[row])
    over_layers.set_xlabel("layer, in the order of the network, after the last logged epoch")
    finish(figure, [over_epochs], logged["epoch"].unique(), path, columns=2)
    return True
