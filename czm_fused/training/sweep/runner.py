"""Training the runs of a sweep, one after another, beside other processes that do the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from .. import checkpoint, data, distributed
from ..errors import DivergedError, TrainingError
from ..run import pick_device, run_together
from ..settings import Settings, resolve_resumed
from .folder import SweepFolder
from .rows import Row

Resumable = tuple[Settings, "dict[str, Any] | None"]


class Sweep:
    """The runs of some rows and seeds in a folder.

    Args:
        folder: opened for `given`.
        rows: which to train.
        seeds: of each row.
        given: options of `czm-train` for all runs.
        parallel_seeds: how many seeds of a row to train together.

    Attributes:
        runs: all of them, by row and seed.
        trouble: what is wrong with the runs that had to be passed over.
    """

    def __init__(
        self,
        folder: SweepFolder,
        rows: Sequence[Row],
        seeds: Sequence[int],
        given: dict[str, Any],
        parallel_seeds: int = 1,
    ) -> None:
        self.folder = folder
        self.given = given
        chunks = [seeds[i : i + parallel_seeds] for i in range(0, len(seeds), parallel_seeds)]
        self._groups = [(row, chunk) for chunk in chunks for row in rows]
        self.runs = [(row, seed) for row, chunk in self._groups for seed in chunk]
        self.trouble: dict[tuple[Row, int], str] = {}

    def train(self) -> None:
        """Train what nobody else is training, until there is nothing left to begin.

        Seeds advance row by row, so that a partial table covers all rows. A run that another
        process loses meanwhile is taken over from its checkpoint.

        Raises:
            TrainingError: a run cannot start or go on, for a reason that would stop others too.
        """
        if distributed.is_launched():
            raise TrainingError(
                "table1 trains each run in one process: instead of torchrun, start it several "
                "times with the same --out"
            )
        if self.given.get("download"):
            # One process fetches the data, and the others find them.
            with self.folder.locked():
                row, seed = self.runs[0]
                data.load(row.settings(self.given, seed, self.folder.path))
        already_ended = len(self.runs) - len(self.left())
        started = time.monotonic()
        found_work = True
        while found_work:
            found_work = False
            for row, seeds in self._groups:
                with ExitStack() as claims:
                    ours = [seed for seed in seeds if self._claim(claims, row, seed)]
                    if ours:
                        self._announce(row, ours, already_ended, time.monotonic() - started)
                        self._train(row, ours)
                        found_work = True

    def left(self) -> list[tuple[Row, int]]:
        """Return the runs that have neither ended nor diverged."""
        return [run for run in self.runs if not self.folder.ended(*run)]

    def _claim(self, claims: ExitStack, row: Row, seed: int) -> bool:
        if (row, seed) in self.trouble or self.folder.ended(row, seed):
            return False
        # Whoever held it until now may have ended it.
        is_ours = claims.enter_context(self.folder.claimed(row, seed))
        return is_ours and not self.folder.ended(row, seed)

    def _announce(self, row: Row, seeds: Sequence[int], already_ended: int, seconds: float) -> None:
        from tqdm import tqdm

        ended = len(self.runs) - len(self.left())
        meter = tqdm.format_meter(
            ended, len(self.runs), seconds, unit="run", ncols=60, initial=already_ended
        )
        print(f"\n{meter}\n{row.title}, seed {', '.join(map(str, seeds))}", flush=True)

    def _train(self, row: Row, seeds: Sequence[int]) -> None:
        found = {seed: self._resumable(row, seed) for seed in seeds}
        begun = {seed: run for seed, run in found.items() if run is not None}
        if not begun:
            return
        try:
            run_together(list(begun.values()))
        except DivergedError as error:
            if len(begun) == 1:
                self.folder.note_divergence(row, next(iter(begun)), str(error))
                print(f"diverged: {error}", flush=True)
                return
            # The others go on from their checkpoints.
            for seed in begun:
                self._train(row, [seed])

    def _resumable(self, row: Row, seed: int) -> Resumable | None:
        folder = self.folder.run_folder(row, seed)
        settings = row.settings(self.given, seed, folder)
        if not (folder / checkpoint.FILE_NAME).exists():
            return settings, None
        try:
            resumed = checkpoint.load(folder)
            settings = resolve_resumed(settings.as_dict(), resumed["settings"])
            _check_device(resumed, settings.device)
        except TrainingError as error:
            self.trouble[row, seed] = str(error)
            print(f"passed over: {error}", flush=True)
            return None
        return settings, resumed


def _check_device(resumed: dict[str, Any], name: str) -> None:
    begun, here = resumed["trainer"]["device_type"], pick_device(name).type
    if begun != here:
        raise TrainingError(f"begun on {begun}, and this process trains on {here}")
