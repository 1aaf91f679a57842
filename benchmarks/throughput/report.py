"""Rows, the table on the terminal, the machine they belong to, and the bar chart."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEYS = (
    "model",
    "provider",
    "backend",
    "dtype",
    "device",
    "p20_us",
    "p50_us",
    "p80_us",
    "bytes",
    "gbps",
    "ratio_to_sgd_fused",
)

Row = dict[str, Any]


def step_bytes(shapes: Sequence[torch.Size], dtype: torch.dtype, is_czm: bool) -> int:
    """Return the bytes that a step cannot help but move.

    Gradient, weight and momentum are read, weight and momentum written; CZM reads and writes the
    log-scale and its momentum of every filter as well, float32 (float64 for float64 weights).
    """
    total = 5 * dtype.itemsize * sum(shape.numel() for shape in shapes)
    if is_czm:
        filters = sum(shape[0] for shape in shapes if len(shape) > 2)
        total += 4 * max(dtype.itemsize, 4) * filters
    return total


def percentiles(times: np.ndarray) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile of times in microseconds."""
    values = np.percentile(times, (20, 50, 80))
    return {f"p{share}_us": float(v) for share, v in zip((20, 50, 80), values, strict=True)}


def machine(device: torch.device) -> dict[str, Any]:
    """Say on what, and with what, a run is made."""
    facts: dict[str, Any] = {
        "machine": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def table(rows: Sequence[Row]) -> str:
    """Lay rows out in columns, for a terminal."""
    cells = [("model", "provider", "backend", "dtype", "device", "p20", "p50", "p80", "MB", "GB/s",
              "x sgd_fused")]  # fmt: skip
    for row in rows:
        cells.append(
            (
                *(row[key] for key in KEYS[:5]),
                *(f"{row[key]:.0f} us" for key in KEYS[5:8]),
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['gbps']:.1f}",
                f"{row['ratio_to_sgd_fused']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = (
            cell.ljust(width) if column < 5 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def require_matplotlib() -> None:
    """Check that a plot can be made.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install czm-fused[train]") from error


def plot(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """Draw the median of every row as a bar, a panel for each model and dtype, as a PNG."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(8, 2.6 * len(panels) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (model, dtype) in zip(all_axes, panels, strict=True):
        panel = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        panel.sort(key=lambda row: row["p50_us"], reverse=True)
        times = [row["p50_us"] / 1e3 for row in panel]
        colors = ["C1" if row["provider"] == "czm_fused" else "C0" for row in panel]
        labels = [_label(row) for row in panel]
        spans = [
            [t - row["p20_us"] / 1e3 for t, row in zip(times, panel, strict=True)],
            [row["p80_us"] / 1e3 - t for t, row in zip(times, panel, strict=True)],
        ]
        bars = axes.barh(labels, times, color=colors, xerr=spans, ecolor="0.3")
        ratios = [f" {row['ratio_to_sgd_fused']:.2f}x" for row in panel]
        axes.bar_label(bars, ratios, padding=6)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_title(f"{model}, {dtype}", loc="left")
        axes.set_xlabel("milliseconds a step (median, bar: 20th to 80th percentile)")
    figure.suptitle(
        f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}, "
        f"commit {facts['commit']}",
        fontsize="small",
    )
    figure.savefig(path, format="png", dpi=150)


def _label(row: Row) -> str:
    return f"{row['provider']} ({row['backend']})" if row["backend"] != "torch" else row["provider"]


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
