"""A run, from its settings to its summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..ops import backends
from . import checkpoint, data, distributed, metrics
from .errors import DivergedError, TrainingError
from .extras import require
from .files import replacing
from .interrupts import held_back
from .loop import Trainer, test, train_epoch
from .methods import direction_norms, uses_czm
from .plots import name_network, plot_accuracy, plot_filters
from .rejection import is_due, rejection
from .settings import Settings, option


def run(settings: Settings, *, resumed: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train as `settings` say into the folder `settings.out`; return the summary.

    The folder receives `metrics.jsonl`, TensorBoard's `events.*`, `checkpoint.pt` (from before the
    first epoch on, replaced after each), and at the end `summary.json`, `accuracy.png` and
    `filters.png`. Nothing is written before the data are read and the network is built; then
    another run that lies there is replaced. Of the processes that `torchrun` started, the first
    writes.

    Args:
        settings: the run's, complete.
        resumed: the checkpoint to go on from, as `checkpoint.load` returns it.

    Raises:
        TrainingError: something is missing, broken or does not fit.
        DivergedError: the loss is not finite.
    """
    return run_together([(settings, resumed)])[0]


def run_together(
    runs: Sequence[tuple[Settings, dict[str, Any] | None]],
) -> list[dict[str, Any]]:
    """Train several runs on one device, a step of each in turn; return what `run` does of each.

    Each ends as it would alone. Runs that were interrupted at different epochs catch up first.

    Args:
        runs: settings that differ in the seed and the folder alone, each with the checkpoint to go
            on from, or None.

    Raises:
        TrainingError: something is missing, broken or does not fit.
        DivergedError: a loss is not finite.
    """
    require("tqdm", "matplotlib", "tensorboard")
    settings = runs[0][0]
    device = pick_device(settings.device)
    check_options(settings, device, len(runs))
    if uses_czm(settings):
        check_backend(settings.backend, device)
    with distributed.joined(device) as ranks, ExitStack() as stack:
        with ranks.in_turn():
            dataset = data.load(settings).to(device)
        begun = [_Run(each, resumed, dataset, device, ranks) for each, resumed in runs]
        for each in begun:
            stack.callback(each.close)
            each.open()
        with held_back() as stop_if_asked:
            _train(begun, stop_if_asked)
        return [each.finish() for each in begun]


def check_options(settings: Settings, device: torch.device, runs: int) -> None:
    """Check that the options of speed have something to act on.

    Args:
        settings: of one of the runs.
        device: where they run.
        runs: how many are trained together.

    Raises:
        TrainingError: they have not; the message says the remedy.
    """
    for name in ("cuda_graph", "tf32"):
        if getattr(settings, name) and device.type != "cuda":
            raise TrainingError(
                f"{option(name)} needs --device cuda, and this is a run on {device.type}: leave it "
                "out here; --channels-last, --autocast bfloat16 and --compile act everywhere"
            )
    if not distributed.is_launched():
        return
    for name, is_on in (("cuda_graph", settings.cuda_graph), ("parallel_seeds", runs > 1)):
        if is_on:
            raise TrainingError(
                f"{option(name)} is for a single process: leave it out under torchrun, or start "
                "czm-train without"
            )


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `"auto"` is the accelerator if there is one, else the CPU.

    Each of several processes that `torchrun` starts on a machine takes an accelerator of its own.

    Raises:
        TrainingError: it is not available here.
    """
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            device = found or torch.device("cpu")
        else:
            device = torch.device(name)
            torch.ones(1, device=device).item()
        if device.type == "cpu":
            return device
        index = device.index
        if index is None:
            index = distributed.local_rank()
        if index is None:
            index = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(index)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name} is not available here: {reason}") from error
    return torch.device(device.type, index)


def check_backend(name: str, device: torch.device) -> None:
    """Check that the optimizer step called `name` can run on `device`.

    Raises:
        TrainingError: it cannot; the message says the remedy.
    """
    try:
        backends.choose(device, name)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(str(error)) from error


def _open_log(folder: Path, history: list[dict[str, Any]]) -> metrics.MetricsLog:
    stale = ["summary.json", "accuracy.png", "filters.png"]
    if not history:
        stale.append(metrics.EVENTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in stale:
            for file in folder.glob(pattern):
                file.unlink()
        return metrics.MetricsLog(folder, history)
    except OSError as error:
        raise TrainingError(f"cannot write into --out {folder}: {error}") from error


class _Run:
    """A run in progress: its trainer, its folder and what has been written there.

    Args:
        settings: of the run.
        resumed: the checkpoint to go on from, or None.
        dataset: on `device`.
        device: where it trains.
        ranks: the processes that train it; the first writes.
    """

    def __init__(
        self,
        settings: Settings,
        resumed: dict[str, Any] | None,
        dataset: data.DataSet,
        device: torch.device,
        ranks: distributed.Ranks,
    ) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        try:
            self.trainer = Trainer(settings, dataset, device, ranks)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        if resumed is not None:
            self.trainer.load_state_dict(resumed["trainer"])
            self.history, self.seconds = list(resumed["history"]), resumed["seconds"]
        self._writes = ranks.rank == 0
        self._log: metrics.MetricsLog | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all epochs are done."""
        return self.trainer.epoch >= self.settings.epochs

    def open(self) -> None:
        """Begin to write, replacing another run, with the checkpoint to start from."""
        if self._writes:
            self._log = _open_log(self.folder, self.history)
            self._save()

    def add(self, record: dict[str, Any], title: str) -> None:
        """Write what an epoch came to, and the state after it, and print it after `title`."""
        self.history.append(record)
        self.seconds += record["seconds"]
        if self._log is not None:
            self._log.add(record)
            self._save()
            print(title + metrics.describe(record, self.settings.epochs), flush=True)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def finish(self) -> dict[str, Any]:
        """Write the summary and the pictures; return the summary."""
        summary = {
            **self.settings.as_dict(),
            "test_accuracy": self.history[-1]["test_accuracy"],
            "seconds": self.seconds,
        }
        if self._writes:
            _write_results(self.folder, self.settings, summary, self.history)
        return summary

    def _save(self) -> None:
        state = {
            "settings": self.settings.as_dict(),
            "trainer": self.trainer.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }
        checkpoint.save(self.folder / checkpoint.FILE_NAME, state)


def _train(runs: Sequence[_Run], stop_if_asked: Callable[[], None]) -> None:
    while incomplete := [each for each in runs if not each.is_complete]:
        epoch = min(each.trainer.epoch for each in incomplete)
        _epoch([each for each in incomplete if each.trainer.epoch == epoch], stop_if_asked)


def _epoch(runs: Sequence[_Run], stop_if_asked: Callable[[], None]) -> None:
    trainers = [each.trainer for each in runs]
    rates = [trainer.lr for trainer in trainers]
    started = time.perf_counter()
    try:
        trained = train_epoch(trainers, stop_if_asked)
        train_seconds = time.perf_counter() - started
        tested = test(trainers, stop_if_asked)
    except DivergedError as error:
        places = ", ".join(str(each.folder / checkpoint.FILE_NAME) for each in runs)
        verb = "holds the run" if len(runs) == 1 else "hold the runs"
        raise DivergedError(
            f"{error}; {places} {verb} after epoch {len(runs[0].history)}; lower learning rates "
            "may help"
        ) from error
    seconds = time.perf_counter() - started
    for each, lr, train_result, test_result in zip(runs, rates, trained, tested, strict=True):
        norms = direction_norms(each.trainer.model, each.trainer.optimizer)
        record = {
            "epoch": each.trainer.epoch,
            "lr": lr,
            "train_loss": train_result[0],
            "train_accuracy": train_result[1],
            "test_loss": test_result[0],
            "test_accuracy": test_result[1],
            "filter_norms": metrics.quantiles(norms),
            "collapsed_filters": metrics.collapsed(norms),
            "images_per_second": len(each.trainer.data.train) / train_seconds,
            "seconds": seconds,
        }
        if is_due(each.trainer.epoch, each.settings.epochs):
            record["rejection_db"] = rejection(each.trainer)
        each.add(record, f"seed {each.settings.seed}  " if len(runs) > 1 else "")


def _write_results(
    folder: Path, settings: Settings, summary: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    name = f"{name_network(summary)}, {settings.method}"
    plot_accuracy(folder / "accuracy.png", history, title=name)
    plot_filters(folder / "filters.png", history, title=name)
    # Last, as it says to a sweep that all is done.
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    print(
        f"{name}: {summary['test_accuracy']:.2f} % test accuracy in the final epoch "
        f"({history[-1]['epoch']}), {summary['seconds']:.0f} s; see {folder}"
    )
