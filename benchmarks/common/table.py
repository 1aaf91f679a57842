"""The one table of all benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# A unit, what it is shown in, and how many of the one make one of the other.
_SHOWN = {"us": ("ms", 1e3), "bytes": ("MB", 1e6)}


def shown_in(unit: str) -> tuple[str, float]:
    """Return the unit that people read for a unit of rows, and the divisor that leads to it."""
    return _SHOWN.get(unit, (unit, 1.0))


def table(
    frame: pd.DataFrame,
    index: Sequence[str] = ("provider",),
    baseline: str | None = None,
    shares: Sequence[str] = (),
    panel: str = "model",
) -> str:
    """Return rows as text: a block for each model, a line for each provider, a column a metric.

    A cell is the median, with the 20th and 80th percentile where they differ.

    Args:
        frame: rows as `rows.frame` makes them.
        index: the columns that name a line.
        baseline: the provider whose medians `shares` are relative to.
        shares: metrics that get a column of their own with the share of the baseline's.
        panel: the column that tells the blocks apart.
    """
    import pandas as pd

    blocks = []
    for name, part in frame.groupby(panel, sort=False):
        index_now = [each for each in index if each in part and part[each].nunique() > 1]
        index_now = index_now or ["provider"]
        columns: dict[str, dict[Any, str]] = {}
        for metric, measured in part.groupby("metric", sort=False):
            unit, divisor = shown_in(measured["unit"].iloc[0])
            title = f"{metric} {unit}".removesuffix(f" {metric}")
            cells = columns.setdefault(title, {})
            base = measured.loc[measured["provider"] == baseline, "p50"]
            for _, row in measured.iterrows():
                line = tuple(_text(row[each]) for each in index_now)
                cells[line] = _cell(row, divisor)
                if metric in shares and len(base) and base.iloc[0] and row["p50"] == row["p50"]:
                    relative = columns.setdefault(f"{metric} / {baseline}", {})
                    relative[line] = _number(row["p50"] / base.iloc[0])
        lines = list(dict.fromkeys(line for cells in columns.values() for line in cells))
        data = {
            title: [cells.get(line, "") for line in lines] for title, cells in columns.items()
        }
        text = pd.DataFrame(data, index=pd.MultiIndex.from_tuples(lines, names=index_now))
        blocks.append(f"{name}\n{text.reset_index().to_string(index=False)}")
    return "\n\n".join(blocks)


def _cell(row: Any, divisor: float) -> str:
    if row["p50"] != row["p50"]:
        return "impossible"
    low, middle, high = (_number(row[each] / divisor) for each in ("p20", "p50", "p80"))
    return middle if low == middle == high or low == "nan" else f"{middle} ({low}-{high})"


def _number(value: float) -> str:
    if math.isnan(value):
        return "nan"
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)
