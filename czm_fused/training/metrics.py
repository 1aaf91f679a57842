"""What a run tells while it trains: JSON lines, TensorBoard events and a line on the terminal."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TrainingError
from .files import replacing

FILE_NAME = "metrics.jsonl"
EVENTS = "events.*"

QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def quantiles(values: Tensor) -> dict[str, float]:
    """Return the `QUANTILES` of a 1-d tensor by name."""
    levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    found = torch.quantile(values.double().cpu(), levels).tolist()
    return dict(zip(QUANTILES, found, strict=True))


def collapsed(norms: Tensor) -> float:
    """Return the share of filters whose norm is below 0.1 of the median norm, 0 to 1.

    Args:
        norms: of all filters, `(filters,)`.
    """
    return float((norms < 0.1 * norms.median()).double().mean())


class MetricsLog:
    """The records of the epochs, one JSON object a line, mirrored as TensorBoard scalars.

    Args:
        folder: of the run.
        history: the records of the epochs before; the file is cut or completed to just these.

    Attributes:
        history: all records, the latest last.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.history = list(history)
        self.path = folder / FILE_NAME
        with replacing(self.path) as file:
            file.write("".join(map(_line, self.history)).encode())
        self._events = SummaryWriter(str(folder), purge_step=len(self.history) + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Append an epoch's record, numbers by name, nested or not."""
        self.history.append(record)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
            for name, value in _flatten(record):
                self._events.add_scalar(name, value, record["epoch"])
            self._events.flush()
        except OSError as error:
            raise TrainingError(f"cannot write into {self.path.parent}: {error}") from error

    def close(self) -> None:
        # What a full disk kept from being written was reported by `add`.
        with suppress(OSError):
            self._events.close()


def describe(record: dict[str, Any], epochs: int) -> str:
    """Return an epoch's record as a line for the terminal."""
    return (
        f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}"
        f"  lr {record['lr']:<6.4g}"
        f"  train loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:6.2f} %"
        f"  test loss {record['test_loss']:.4f}  accuracy {record['test_accuracy']:6.2f} %"
        f"  {record['images_per_second']:.0f} images/s"
    )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _flatten(record: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = []
    for name, value in record.items():
        if isinstance(value, dict):
            scalars += [(f"{name}/{key}", number) for key, number in value.items()]
        elif name != "epoch":
            group, _, rest = name.partition("_")
            scalars.append((f"{group}/{rest}" if group in ("train", "test") else name, value))
    return scalars
