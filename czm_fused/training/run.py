"""A run, from its settings to its summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..ops import backends
from . import checkpoint, data, metrics
from .errors import TrainingError
from .extras import require
from .files import replacing
from .interrupts import held_back
from .loop import Trainer
from .methods import direction_norms, uses_czm
from .plots import plot_accuracy, plot_filters
from .settings import Settings


def run(settings: Settings, *, resumed: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train as `settings` say into the folder `settings.out`; return the summary.

    The folder receives `metrics.jsonl`, TensorBoard's `events.*`, `checkpoint.pt` (from before the
    first epoch on, replaced after each), and at the end `summary.json`, `accuracy.png` and
    `filters.png`. Nothing is written before the data are read and the network is built; then
    another run that lies there is replaced.

    Args:
        settings: the run's, complete.
        resumed: the checkpoint to go on from, as `checkpoint.load` returns it.

    Raises:
        TrainingError: something is missing, broken or does not fit, or the loss is not finite.
    """
    require("tqdm", "matplotlib", "tensorboard")
    folder = Path(settings.out)
    device = pick_device(settings.device)
    if uses_czm(settings):
        check_backend(settings.backend, device)
    dataset = data.load(settings).to(device)
    try:
        trainer = Trainer(settings, dataset, device)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    history, seconds = [], 0.0
    if resumed is not None:
        trainer.load_state_dict(resumed["trainer"])
        history, seconds = resumed["history"], resumed["seconds"]
    log = _open_log(folder, history)
    try:
        with held_back() as stop_if_asked:
            seconds = _train(trainer, log, folder, seconds, stop_if_asked)
    finally:
        log.close()
    return _finish(settings, log.history, folder, seconds)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `"auto"` is the accelerator if there is one, else the CPU.

    Raises:
        TrainingError: it is not available here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name} is not available here: {reason}") from error
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device


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


def _train(
    trainer: Trainer,
    log: metrics.MetricsLog,
    folder: Path,
    seconds: float,
    stop_if_asked: Callable[[], None],
) -> float:
    epochs = trainer.settings.epochs

    def save() -> None:
        state = {
            "settings": trainer.settings.as_dict(),
            "trainer": trainer.state_dict(),
            "history": log.history,
            "seconds": seconds,
        }
        checkpoint.save(folder / checkpoint.FILE_NAME, state)

    save()
    while trainer.epoch < epochs:
        started = time.perf_counter()
        try:
            record = _epoch(trainer, stop_if_asked)
        except TrainingError as error:
            raise TrainingError(
                f"{error}; {folder / checkpoint.FILE_NAME} holds the run after epoch "
                f"{len(log.history)}; a lower --lr may help"
            ) from error
        log.add(record)
        seconds += time.perf_counter() - started
        save()
        print(metrics.describe(record, epochs), flush=True)
    return seconds


def _epoch(trainer: Trainer, stop_if_asked: Callable[[], None]) -> dict[str, Any]:
    lr = trainer.lr
    started = time.perf_counter()
    train_loss, train_accuracy = trainer.train_epoch(stop_if_asked)
    train_seconds = time.perf_counter() - started
    test_loss, test_accuracy = trainer.test(stop_if_asked)
    return {
        "epoch": trainer.epoch,
        "lr": lr,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "filter_norms": metrics.quantiles(direction_norms(trainer.model, trainer.optimizer)),
        "images_per_second": len(trainer.data.train) / train_seconds,
        "seconds": time.perf_counter() - started,
    }


def _finish(
    settings: Settings, history: list[dict[str, Any]], folder: Path, seconds: float
) -> dict[str, Any]:
    summary = {
        **settings.as_dict(),
        "test_accuracy": history[-1]["test_accuracy"],
        "seconds": seconds,
    }
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    name = f"ResNet{settings.depth} on {settings.dataset}, {settings.method}"
    plot_accuracy(folder / "accuracy.png", history, title=name)
    plot_filters(folder / "filters.png", history, title=name)
    print(
        f"{name}: {summary['test_accuracy']:.2f} % test accuracy in the final epoch "
        f"({history[-1]['epoch']}), {seconds:.0f} s; see {folder}"
    )
    return summary
