"""The runs that lie under a folder, and whether they may be compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .. import checkpoint, metrics
from ..errors import TrainingError
from ..settings import METHOD_DEFAULTS, Settings, option, resolve
from .folder import SUMMARY
from .rows import ROW_SETTINGS, Row, shared

METHOD_SETTINGS = {"method", *METHOD_DEFAULTS["bn"]}
_SETTINGS = [field.name for field in fields(Settings)]


@dataclass(frozen=True)
class Result:
    """What a run has left so far.

    Attributes:
        settings: of the run, by name.
        history: its metrics, one record an epoch.
    """

    folder: Path
    settings: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def test_accuracy(self) -> float:
        """In the latest epoch, %."""
        return float(self.history[-1]["test_accuracy"])


def complete_results(folder: Path) -> list[Result]:
    """Return the runs of `czm-train` anywhere under `folder` that have trained all their epochs.

    Raises:
        TrainingError: the folder is missing, or a file in it is damaged.
    """
    return [_read_complete(run) for run in _runs_under(folder) if (run / SUMMARY).exists()]


def all_results(folder: Path) -> list[Result]:
    """Return the runs of `czm-train` anywhere under `folder` that have trained an epoch.

    Raises:
        TrainingError: the folder is missing, or a file in it is damaged.
    """
    results = [
        _read_complete(run) if (run / SUMMARY).exists() else _read_begun(run)
        for run in _runs_under(folder)
        if (run / checkpoint.FILE_NAME).exists() or (run / SUMMARY).exists()
    ]
    return [result for result in results if result.history]


def of_row(results: Sequence[Result], row: Row) -> list[Result]:
    """Return those results that are runs of `row`."""
    return [result for result in results if row.trained(result.settings)]


def check_comparable(results: Sequence[Result]) -> dict[str, Any]:
    """Check that the runs differ in the method and its settings alone; return what they share.

    Runs of the same method, learning rate, zmg and noise may differ in nothing but the seed.

    Raises:
        TrainingError: they differ in something else, or two of them are the same run.
    """
    of_rows: dict[tuple[Any, ...], Result] = {}
    of_seeds: dict[tuple[Any, ...], Result] = {}
    for result in results:
        row = tuple(result.settings.get(name) for name in ROW_SETTINGS)
        _check_alike(of_rows.setdefault(row, result), result)
        _check_alike(results[0], result, except_for=METHOD_SETTINGS)
        same = of_seeds.setdefault((*row, result.settings["seed"]), result)
        if same is not result:
            raise TrainingError(f"{same.folder} and {result.folder} hold the same run: remove one")
    settings = shared(results[0].settings)
    return {name: value for name, value in settings.items() if name not in METHOD_SETTINGS}


def departures(results: Sequence[Result]) -> list[str]:
    """Return the options of the runs that are not the defaults of their method and data set.

    What a row sets, where a run computes, and the length of the training are left out.
    """
    found: set[str] = set()
    for result in results:
        names = ("method", "dataset", "epochs")
        given = {name: result.settings[name] for name in names if name in result.settings}
        default = resolve(given).as_dict()
        for name, value in shared(result.settings).items():
            if name not in (*ROW_SETTINGS, "depth") and value != default[name]:
                found.add(f"{option(name)} {value}")
    return sorted(found)


def check_folder(folder: Path) -> None:
    """Raise a TrainingError unless `folder` is there."""
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {folder}")


def _check_alike(first: Result, other: Result, except_for: Collection[str] = ()) -> None:
    for name in sorted(shared({**first.settings, **other.settings})):
        values = first.settings.get(name), other.settings.get(name)
        if name not in except_for and values[0] != values[1]:
            raise TrainingError(
                f"{first.folder} and {other.folder} cannot be compared: "
                f"{option(name)} was {values[0]} and {values[1]}"
            )


def _runs_under(folder: Path) -> list[Path]:
    check_folder(folder)
    return [log.parent for log in sorted(folder.rglob(metrics.FILE_NAME))]


def _read_complete(folder: Path) -> Result:
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        lines = (folder / metrics.FILE_NAME).read_text().splitlines()
        history = [json.loads(line) for line in lines]
        settings = {name: summary[name] for name in _SETTINGS if name in summary}
        settings["seed"], history[-1]["test_accuracy"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainingError(f"cannot read the run in {folder}: {error!r}") from error
    return Result(folder, settings, history)


def _read_begun(folder: Path) -> Result:
    state = checkpoint.load(folder)
    return Result(folder, state["settings"], state["history"])
