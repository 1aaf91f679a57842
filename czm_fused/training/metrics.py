"""The metrics of a run: JSON lines, TensorBoard events and a line an epoch on the terminal."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import replacing
from .errors import TrainingError

FILE_NAME = "metrics.jsonl"
EVENTS = "events.out.tfevents.*"

QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def quantiles(values: Tensor) -> dict[str, float]:
    """Return the `QUANTILES` of a 1-d tensor by name."""
    levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    # torch.quantile refuses more than 2**24 values.
    values = values.double().cpu()[:: 1 + len(values) // 2**24]
    return dict(zip(QUANTILES, torch.quantile(values, levels).tolist(), strict=True))


def collapsed(norms: Tensor) -> float:
    """Return the share of filters whose norm is below 0.1 of the median norm, 0 to 1."""
    return float((norms < 0.1 * norms.median()).double().mean())


class MetricsLog:
    """The records of the epochs, one JSON object a line, mirrored as TensorBoard scalars.

    Args:
        folder: the run's.
        history: records of the epochs before; the file is cut or completed to just these.

    Attributes:
        event_files: names of the files of TensorBoard events that this log writes.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / FILE_NAME
        with replacing(self.path) as file:
            file.write("".join(map(_line, history)).encode())
        before = set(folder.glob(EVENTS))
        self._events = SummaryWriter(str(folder), purge_step=len(history) + 1)
        self.event_files = sorted(path.name for path in set(folder.glob(EVENTS)) - before)

    def add(self, record: dict[str, Any]) -> None:
        """Append an epoch's record, numbers by name, nested or not."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
            for name, value in _flatten(record):
                self._events.add_scalar(name, value, record["epoch"])
            self._events.flush()
        except OSError as error:
            raise TrainingError(f"cannot write into {self.path.parent}: {error}") from error

    def close(self) -> None:
        # `add` has reported a full disk.
        with suppress(OSError):
            self._events.close()


def describe(record: dict[str, Any], epochs: int) -> str:
    """Return an epoch's record as a line of less than 80 columns."""
    line = f"epoch {record['epoch']:{len(str(epochs))}}/{epochs} lr {record['lr']:<6.2g}"
    for part in ("train", "test"):
        if f"{part}_loss" in record:
            loss, accuracy = record[f"{part}_loss"], record[f"{part}_accuracy"]
            line += f"  {part} {loss:.3f} {accuracy:6.2f} %"
    return f"{line} {record['images_per_second']:.0f} img/s"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _flatten(record: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = []
    for name, value in record.items():
        if isinstance(value, dict):
            scalars += [(f"{name}/{key}", each) for key, each in value.items() if each is not None]
        elif name != "epoch":
            group, _, rest = name.partition("_")
            scalars.append((f"{group}/{rest}" if group in ("train", "test") else name, value))
    return scalars
