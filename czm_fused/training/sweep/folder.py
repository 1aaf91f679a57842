"""The folder that the processes of a sweep share: what it holds, and who works on what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files import replacing
from ..settings import option
from .rows import TABLE1, Row

FORMAT = "czm-train table1 1"
PROTOCOL = "sweep.json"
SUMMARY = "summary.json"
DIVERGED = "diverged.json"
_SWEEP_LOCK = "sweep.lock"
_RUN_LOCK = "run.lock"


class SweepFolder:
    """A folder with a sub-folder for each row and in it one for each seed's run.

    Locks are the operating system's (flock), which end with the process that holds them, however
    it dies: nothing has to be cleaned up, and a run that lost its process is free at once. Machines
    that share the folder need a file system that carries such locks between them, as NFS does.

    Args:
        path: of the folder, which `open` creates.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, given: dict[str, Any]) -> None:
        """Create the folder, or check that its runs were begun with the same protocol.

        Args:
            given: options for all rows.

        Raises:
            TrainingError: it holds something else, or cannot be written.
        """
        protocol = {row.name: row.protocol(given) for row in TABLE1}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot create --out {self.path}: {error}") from error
        with self.locked():
            if (self.path / PROTOCOL).exists():
                saved = self._read_protocol()
                if not self._is_unused():
                    for name, settings in protocol.items():
                        _check_row(self.path, name, saved[name], settings)
                    return
            elif {file.name for file in self.path.iterdir()} - {_SWEEP_LOCK, f"{PROTOCOL}.tmp"}:
                raise TrainingError(
                    f"--out {self.path} holds files and no {PROTOCOL}: choose an empty folder"
                )
            content = json.dumps({"format": FORMAT, "rows": protocol}, indent=2) + "\n"
            with replacing(self.path / PROTOCOL) as file:
                file.write(content.encode())

    def run_folder(self, row: Row, seed: int) -> Path:
        """Return where the run of a row and a seed lies."""
        return self.path / row.name / f"seed-{seed}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the whole folder's lock, for files that the processes share; wait for it."""
        with _lock(self.path / _SWEEP_LOCK, timeout=-1):
            yield

    @contextmanager
    def claimed(self, row: Row, seed: int) -> Iterator[bool]:
        """Hold a run; give whether this process got it, or another one has it."""
        folder = self.run_folder(row, seed)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot create {folder}: {error}") from error
        with _lock(folder / _RUN_LOCK, timeout=0) as got_it:
            yield got_it

    def ended(self, row: Row, seed: int) -> bool:
        """Return whether a run is complete or has diverged."""
        folder = self.run_folder(row, seed)
        return (folder / SUMMARY).exists() or (folder / DIVERGED).exists()

    def note_divergence(self, row: Row, seed: int, message: str) -> None:
        """Remember that a run has diverged, so that nobody trains it again."""
        with replacing(self.run_folder(row, seed) / DIVERGED) as file:
            file.write((json.dumps({"message": message}, indent=2) + "\n").encode())

    def diverged(self, row: Row) -> list[int]:
        """Return the seeds whose runs have diverged."""
        notes = (self.path / row.name).glob(f"seed-*/{DIVERGED}")
        return sorted(int(note.parent.name.removeprefix("seed-")) for note in notes)

    def _is_unused(self) -> bool:
        """Return whether no run has begun, as when a value that was refused is corrected."""
        for path in self.path.glob("*/seed-*/*"):
            if path.name != _RUN_LOCK:
                return False
            with _lock(path, timeout=0) as is_free:
                if not is_free:
                    return False
        return True

    def _read_protocol(self) -> dict[str, Any]:
        path = self.path / PROTOCOL
        try:
            saved = json.loads(path.read_text())
            known = saved["format"] == FORMAT and saved["rows"].keys() == {r.name for r in TABLE1}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(f"cannot read {path}: {error!r}") from error
        if not known:
            raise _other_version(self.path)
        rows: dict[str, Any] = saved["rows"]
        return rows


def _check_row(path: Path, row: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    if saved.keys() != wanted.keys():
        raise _other_version(path, sorted(saved.keys() ^ wanted.keys()))
    for name, value in wanted.items():
        if saved[name] != value:
            raise TrainingError(
                f"--out {path} was begun with {option(name)} {saved[name]}, not {value} "
                f"(row {row}): give the same options, or choose another folder"
            )


def _other_version(path: Path, settings: Sequence[str] = ()) -> TrainingError:
    differing = f" (it differs in {', '.join(settings)})" if settings else ""
    return TrainingError(
        f"--out {path} was begun by another version of czm-train{differing}: "
        "go on with that version, or choose another folder"
    )


@contextmanager
def _lock(path: Path, timeout: float) -> Iterator[bool]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        raise TrainingError(f"cannot lock {path}: {error}") from error
    try:
        yield True
    finally:
        lock.release()
