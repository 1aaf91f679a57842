"""The metrics of a run: JSON lines, TensorBoard events and a line an epoch on the terminal."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import replacing

FILE_NAME = "metrics.jsonl"
EVENTS_SUFFIX = ".czm-train"
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def quantiles(values: Tensor) -> dict[str, float]:
    """Return the `QUANTILES` of a 1-d tensor by name."""
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    found = values.double().cpu().quantile(shares)
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def collapsed(norms: Tensor) -> float:
    """Return the share of filters whose norm is below 0.1 of the median norm, 0 to 1."""
    return float((norms < 0.1 * norms.median()).double().mean())


def rejection_is_due(epoch: int, epochs: int, times: int = 20) -> bool:
    """Return True after the epochs, about `times` in a run, in which rejection is measured."""
    return epoch % max(1, epochs // times) == 0 or epoch == epochs


class Log:
    """The records of a run's epochs: one JSON object a line, mirrored as TensorBoard scalars.

    Goes on after `history`, and removes the records of later epochs.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = folder / FILE_NAME
        self._write(history)
        self._events = SummaryWriter(
            str(folder), purge_step=len(history) + 1, filename_suffix=EVENTS_SUFFIX
        )

    def add(self, history: list[dict[str, Any]]) -> None:
        """Write the history of the run, whose last record is new."""
        import pandas as pd

        self._write(history)
        numbers = pd.json_normalize(history[-1], sep="/").iloc[0].dropna()
        epoch = int(numbers.pop("epoch"))
        for name, value in numbers.items():
            self._events.add_scalar(re.sub("^(train|test)_", r"\1/", name), value, epoch)
        self._events.flush()

    def close(self) -> None:
        """Close the file of events."""
        self._events.close()

    def _write(self, history: list[dict[str, Any]]) -> None:
        with replacing(self._file) as file:
            for record in history:
                file.write((json.dumps(record, allow_nan=False) + "\n").encode())


def describe(record: dict[str, Any], epochs: int) -> str:
    """Return an epoch's record as a line of less than 80 columns."""
    line = f"epoch {record['epoch']:{len(str(epochs))}}/{epochs} lr {record['lr']:<6.2g}"
    for part in ("train", "test"):
        if f"{part}_loss" in record:
            loss, accuracy = record[f"{part}_loss"], record[f"{part}_accuracy"]
            line += f"  {part} {loss:.3f} {accuracy:6.2f} %"
    return f"{line} {record['images_per_second']:.0f} img/s"
