"""A run, from its config to its summary; `train` for the user's own network."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops import backends
from . import batches, cache, checkpoint, data, distributed, metrics
from .checkpoint import replacing
from .config import Config, ResolvedConfig, check_resumed, from_saved, option
from .errors import DivergedError, TrainingError, require
from .interrupts import held_back
from .methods import direction_norms, uses_czm
from .plots import name_network, plot_accuracy, plot_filters
from .trainer import Trainer, reference_trainer, rejection_is_due

SUMMARY = "summary.json"
LOCK = "run.lock"
_PLOTS = {"accuracy": plot_accuracy, "filters": plot_filters}

OnEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingResult:
    """A complete run.

    Attributes:
        folder: holds the checkpoint, the metrics and the plots.
        history: the metrics, one record an epoch.
        model: the trained network.
        summary: the options of the run and its final figures, as in `summary.json`.
    """

    folder: Path
    history: list[dict[str, Any]]
    model: nn.Module
    summary: dict[str, Any]

    @property
    def test_accuracy(self) -> float | None:
        """Test accuracy in the final epoch, percent; None without test images."""
        return self.history[-1].get("test_accuracy")


def train(
    model: nn.Module,
    data: Any,
    config: Config | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainingResult:
    """Train your own network as it is, with progress bar, checkpoints, metrics and plots.

    The optimizer is `FusedCZMSGD(czm_param_groups(model))` for the methods czmig and czmi, for
    which `czm_init_` or `convert` should have made the network ready, and else `torch.optim.SGD`.
    Options that describe the residual network (depth, noise, gain and the like) have no effect.

    Args:
        model: takes images and returns logits, `(images, classes)`; moved to the device in place.
        data: a DataLoader of (images, labels), or a pair of them for training and test, taken as
            they are; or a folder with train/ and test/, a folder a class, whose images are
            normalised, cropped and mirrored as `config` says.
        config: learning rate, epochs, folder and so on. Default: method czmig for 40 epochs.
        resume: True goes on from the checkpoint in the folder of the run, if there is one.
        overwrite: True replaces the run in that folder, if there is one.

    Raises:
        TrainingError: an option or the data do not fit, or the folder holds something else.
        DivergedError: the loss is not finite.
    """
    config = config or Config()
    if config.out is None:
        config = replace(config, out=str(Path("runs", type(model).__name__.lower())))
    resolved = config.resolve()
    resumed = None
    if resume and Path(resolved.out, checkpoint.FILE_NAME).exists():
        resumed = checkpoint.load(Path(resolved.out))
        check_resumed(resolved, from_saved(resumed["config"]))
    prepare_folder(resolved, overwrite or resumed is not None)
    if not isinstance(data, (str, Path)) and distributed.is_launched():
        raise TrainingError("train() with a DataLoader is for one process: give it a folder")
    build = _of_user(model, data)
    return run(resolved, resumed=resumed, build=build, title=type(model).__name__)


def _of_user(model: nn.Module, source: Any) -> Any:
    def build(config: ResolvedConfig, device: torch.device, ranks: distributed.Ranks) -> Trainer:
        torch.manual_seed(config.seed)
        generator = torch.Generator(device).manual_seed(config.seed)
        found: batches.DeviceBatches | batches.LoaderBatches
        if isinstance(source, (str, Path)):
            with ranks.in_turn():
                images = data.image_folder(
                    Path(source),
                    workers=config.workers or 4,
                    cache_dir=cache.folder(config.cache_dir),
                )
            if config.hold_out:
                images = data.hold_out(images, config.hold_out)
            found = batches.DeviceBatches(images.to(device), config, generator)
        else:
            if config.cuda_graph:
                raise TrainingError("--cuda-graph needs a folder of images: leave it out")
            found = batches.of_loaders(source, device)
        return Trainer(config, found, model.to(device), generator, ranks)

    return build


def _of_reference(
    config: ResolvedConfig, device: torch.device, ranks: distributed.Ranks
) -> Trainer:
    with ranks.in_turn():
        images = data.load(config).to(device)
    return reference_trainer(config, images, device, ranks)


def run(
    config: ResolvedConfig,
    *,
    resumed: dict[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
    build: Callable[..., Trainer] = _of_reference,
    title: str | None = None,
) -> TrainingResult:
    """Train as `config` says into the folder `config.out`.

    The folder receives `checkpoint.pt` (from before the first epoch on, replaced after each),
    `metrics.jsonl`, TensorBoard events, and at the end `accuracy.png`, `filters.png` and
    `summary.json`. Nothing is written before the data are read and the network is built. Of the
    processes that `torchrun` started, the first writes. Seeds torch's default generators.

    Args:
        config: the run's.
        resumed: checkpoint to go on from, as `checkpoint.load` returns it.
        on_epoch: called with the record of each epoch once its checkpoint is written.
        build: returns the trainer.
        title: of the plots.

    Raises:
        TrainingError: something is missing, broken or does not fit.
        DivergedError: the loss is not finite.
    """
    require("tqdm", "matplotlib", "tensorboard", "filelock")
    folder = Path(config.out)
    device = pick_device(config.device)
    check_options(config, device)
    with distributed.joined(device) as ranks:
        writes = ranks.rank == 0
        try:
            trainer = build(config, device, ranks)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        history, seconds = [], 0.0
        if resumed is not None:
            try:
                trainer.load_state_dict(resumed["trainer"])
                history, seconds = list(resumed["history"]), float(resumed["seconds"])
            except (TypeError, LookupError, ValueError) as error:
                raise TrainingError(f"the checkpoint is damaged: {error!r}") from error
        with locked(folder) if writes else nullcontext(), held_back() as stop_if_asked:
            # Every rank takes part in its trainer's state.
            state = _state(config, trainer, history, seconds, None)
            log = _open(folder, state) if writes else None
            try:
                while trainer.epoch < config.epochs:
                    record = _epoch(trainer, folder, stop_if_asked)
                    history.append(record)
                    seconds += record["seconds"]
                    state = _state(config, trainer, history, seconds, log)
                    if log is not None:
                        log.add(record)
                        checkpoint.save(folder / checkpoint.FILE_NAME, state)
                        print(metrics.describe(record, config.epochs), flush=True)
                    if on_epoch is not None:
                        on_epoch(record)
            finally:
                if log is not None:
                    log.close()
            summary = {**config.as_dict(), "seconds": seconds}
            summary.update(
                (name, history[-1][name])
                for name in ("train_accuracy", "test_accuracy")
                if name in history[-1]
            )
            if writes:
                name = f"{title or name_network(summary)}, {config.method}"
                _write_results(folder, config, summary, history, name)
    return TrainingResult(folder, history, trainer.model, summary)


def prepare_folder(config: ResolvedConfig, may_replace: bool) -> None:
    """Check that the folder of a run is free, or holds a run that may be replaced.

    Raises:
        TrainingError: it holds something else.
    """
    folder = Path(config.out)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise TrainingError(f"--out {folder} must be a folder, but is a file: choose another")
    names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} - {LOCK}
    if not names:
        return
    if checkpoint.FILE_NAME not in names:
        raise TrainingError(
            f"--out {folder} holds other files ({min(names)}) and no run: choose an empty folder"
        )
    if not may_replace:
        raise TrainingError(
            f"--out {folder} holds a run: continue it with --resume, replace it with --overwrite, "
            "or choose another --out"
        )
    checkpoint.load(folder)  # refuses to replace the file of another program


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder of a run, which is created; the lock ends with the process.

    Args:
        folder: a process that holds it may hold it again.
        wait: for another process that holds it.

    Raises:
        TrainingError: another process holds it, or it cannot be created.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, is_singleton=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise TrainingError(
            f"another process trains in --out {folder}: wait for it, or choose another --out"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise TrainingError(f"cannot write into --out {folder}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def check_options(config: ResolvedConfig, device: torch.device) -> None:
    """Check that the options of speed have something to act on.

    Raises:
        TrainingError: they have not; the message says the remedy.
    """
    for name in ("cuda_graph", "tf32"):
        if getattr(config, name) and device.type != "cuda":
            raise TrainingError(
                f"{option(name)} needs --device cuda, and this is a run on {device.type}: leave it "
                "out here; --channels-last, --autocast bfloat16 and --compile act everywhere"
            )
    if distributed.is_launched() and config.cuda_graph:
        raise TrainingError("--cuda-graph is for a single process: leave it out under torchrun")
    if uses_czm(config):
        try:
            backends.choose(device, config.backend)
        except (ValueError, RuntimeError) as error:
            raise TrainingError(str(error)) from error


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `"auto"` is a GPU if there is one, else the CPU.

    Each of several processes that `torchrun` starts on a machine takes a GPU of its own.

    Raises:
        TrainingError: it is not available here.
    """
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            usable = found is not None and found.type != "mps"
            device = found if usable and found is not None else torch.device("cpu")
        else:
            device = torch.device({"gpu": "cuda"}.get(name, name))
            torch.ones(1, device=device).item()
        if device.type == "mps":
            raise RuntimeError("czm-train trains on CPUs and CUDA GPUs")
        if device.type == "cpu":
            return device
        index = device.index
        if index is None and distributed.is_launched():
            index = distributed.local_rank()
        if index is None:
            index = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(index)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise TrainingError(
            f"--device {name} is not available here ({reason}): use --device cpu, or auto"
        ) from error
    return torch.device(device.type, index)


def _open(folder: Path, state: dict[str, Any]) -> metrics.MetricsLog:
    """Remove what another run, or the resumed one, has left, and begin the files of this one."""
    stale = [SUMMARY, *(f"{name}.{suffix}" for name in _PLOTS for suffix in ("png", "svg", "pdf"))]
    history = state["history"]
    try:
        known = (folder / checkpoint.FILE_NAME).exists()
        written = checkpoint.load(folder).get("event_files", []) if known else []
        if not history:
            stale += map(str, written)
        if known:
            for name in stale:
                (folder / Path(name).name).unlink(missing_ok=True)
        # First of all files: it tells that the folder is a run of czm-train.
        checkpoint.save(folder / checkpoint.FILE_NAME, state)
        log = metrics.MetricsLog(folder, history)
        if history:
            log.event_files = [*map(str, written), *log.event_files]
        state["event_files"] = log.event_files
        checkpoint.save(folder / checkpoint.FILE_NAME, state)
        return log
    except OSError as error:
        raise TrainingError(f"cannot write into --out {folder}: {error}") from error


def _state(
    config: ResolvedConfig,
    trainer: Trainer,
    history: list[dict[str, Any]],
    seconds: float,
    log: metrics.MetricsLog | None,
) -> dict[str, Any]:
    return {
        "config": config.as_dict(),
        "trainer": trainer.state_dict(),
        "history": history,
        "seconds": seconds,
        "event_files": [] if log is None else log.event_files,
    }


def _epoch(trainer: Trainer, folder: Path, stop_if_asked: Callable[[], None]) -> dict[str, Any]:
    lr = trainer.lr
    done = trainer.epoch
    started = time.perf_counter()
    try:
        loss, accuracy, images = trainer.train_epoch(stop_if_asked)
        train_seconds = time.perf_counter() - started
        record: dict[str, Any] = {
            "epoch": trainer.epoch,
            "lr": lr,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "images_per_second": images / train_seconds,
        }
        if trainer.has_test:
            record["test_loss"], record["test_accuracy"], _ = trainer.test(stop_if_asked)
    except DivergedError as error:
        raise DivergedError(
            f"{error}; {folder / checkpoint.FILE_NAME} holds the run after epoch {done}; lower "
            "learning rates may help"
        ) from error
    record["seconds"] = time.perf_counter() - started
    norms = direction_norms(trainer.model, trainer.optimizer)
    if len(norms):
        record["filter_norms"] = metrics.quantiles(norms)
        record["collapsed_filters"] = metrics.collapsed(norms)
        if rejection_is_due(trainer.epoch, trainer.config.epochs):
            record["rejection_db"] = trainer.rejection()
    return record


def _write_results(
    folder: Path,
    config: ResolvedConfig,
    summary: dict[str, Any],
    history: list[dict[str, Any]],
    title: str,
) -> None:
    for name, plot in _PLOTS.items():
        if name == "filters" and "filter_norms" not in history[0]:
            continue
        try:
            plot(folder / f"{name}.{config.plot_format}", history, title=title)
        except TrainingError:
            raise
        except Exception as error:  # a broken plotting library must not lose the run
            reason = " ".join(str(error).split())
            print(f"czm-train: warning: cannot draw {name}: {reason}", file=sys.stderr)
    # Last, because a sweep takes it as the sign of a complete run.
    with replacing(folder / SUMMARY) as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    part = "test" if "test_accuracy" in summary else "train"
    print(
        f"{title}: {summary[f'{part}_accuracy']:.2f} % {part} accuracy in the final epoch "
        f"({history[-1]['epoch']}), {summary['seconds']:.0f} s; see {folder}",
        flush=True,
    )
