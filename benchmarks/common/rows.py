"""The one schema of all measurements: a row for each metric, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .machine import Machine

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Row:
    """One metric of one provider.

    Attributes:
        benchmark: the question, by the name of its file.
        model: network or tensors measured.
        provider: what is compared with the other providers.
        metric: what was measured.
        unit: of `p20`, `p50` and `p80`: us, bytes, images, ...
        p20: 20th percentile, or None where nothing could be measured.
        p50: median; a count or a single value is its own percentiles.
        p80: 80th percentile.
        n: how many values the percentiles are of; None where it was not recorded.
        device: as in `Machine`, like the four that follow.
        processor: see `Machine`.
        threads: see `Machine`.
        torch: see `Machine`.
        commit: see `Machine`.
        config: everything else that the value depends on: dtype, batch, backend, ...
    """

    benchmark: str
    model: str
    provider: str
    metric: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    n: int | None
    device: str
    processor: str
    threads: int | None
    torch: str
    commit: str
    config: dict[str, Any]

    @property
    def key(self) -> tuple[str, ...]:
        """What tells this row from the others of its benchmark."""
        config = json.dumps(self.config, sort_keys=True)
        return (self.model, self.provider, self.metric, config)


class Results:
    """The rows of a run, each in the file as soon as it is added.

    Args:
        benchmark: the name that the rows carry.
        device: where the work runs.
        path: the file of rows, replaced with the first row that is added; None to keep no file.
        resume: keep the rows that the file has, and add to them.

    Raises:
        ValueError: `resume` is given and the file has something else than rows.
    """

    def __init__(
        self,
        benchmark: str,
        device: torch.device,
        path: Path | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.benchmark, self.path = benchmark, path
        self.machine = Machine.of(device)
        keeps = resume and path is not None and path.exists()
        self.rows = read(path) if keeps and path is not None else []
        self._replace = not keeps

    def add(
        self,
        model: str,
        provider: str,
        metric: str,
        unit: str,
        values: float | Sequence[float] | np.ndarray | None,
        **config: Any,
    ) -> Row:
        """Append a row.

        Args:
            model: see `Row`, like the three that follow.
            provider: see `Row`.
            metric: see `Row`.
            unit: see `Row`.
            values: all that were measured, one number, or None (also NaN) where nothing could be.
            config: see `Row`.
        """
        found = np.atleast_1d(np.asarray([] if values is None else values, dtype=float))
        found = found[~np.isnan(found)]
        percentiles: Sequence[float | None] = [None] * 3
        if found.size:
            percentiles = [float(each) for each in np.percentile(found, (20, 50, 80))]
        p20, p50, p80 = percentiles
        row = Row(
            self.benchmark, model, provider, metric, unit, p20, p50, p80, int(found.size),
            **asdict(self.machine), config=config,
        )  # fmt: skip
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("w" if self._replace else "a") as file:
                file.write(to_line(row))
            self._replace = False
        return row

    def has(self, model: str, provider: str, metric: str, **config: Any) -> bool:
        """Return True if a row of this model, provider, metric and configuration is there."""
        wanted = (model, provider, metric, json.dumps(config, sort_keys=True))
        return any(row.key == wanted for row in self.rows)


def to_line(row: Row) -> str:
    """Return the row as a line of JSON."""
    return json.dumps(asdict(row), allow_nan=False) + "\n"


def read(path: Path) -> list[Row]:
    """Return the rows of a file.

    An incomplete last line, which a killed run leaves, is dropped from the file too.

    Raises:
        ValueError: a line is no row; the message names the file and the line.
    """
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    names = {field.name for field in fields(Row)}
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"{path}, line {number}: not a row of a benchmark; name another file")
        rows.append(Row(**values))
    return rows


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a pandas table in which every entry of the configuration is a column."""
    import pandas as pd

    records = [asdict(row) for row in rows]
    return pd.DataFrame([record | record.pop("config") for record in records])


def value(rows: Iterable[Row], **wanted: Any) -> float:
    """Return the median of the one row that has these values; NaN if it was not measurable.

    Args:
        rows: where to look.
        wanted: values of the row's fields or of its configuration.

    Raises:
        LookupError: there is no such row, or more than one.
    """
    found = [row for row in rows if wanted.items() <= {**row.config, **_scalars(row)}.items()]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {wanted}, not one")
    median = found[0].p50
    return math.nan if median is None else median


def _scalars(row: Row) -> dict[str, Any]:
    return {name: each for name, each in vars(row).items() if name != "config"}
