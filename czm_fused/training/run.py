"""A run, from its config to its summary; `train` for the user's own network."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from filelock import FileLock, Timeout
from torch import nn

from ..init import named_convolutions
from ..ops import backends
from . import checkpoint, data, distributed, metrics, plots
from .checkpoint import replacing
from .config import LOCAL, Config, PlotFormat, check_resumed, difference, from_saved, option
from .errors import CheckpointError, DivergedError, TrainingError, explained
from .methods import direction_norms, uses_czm
from .trainer import Trainer

SUMMARY = "summary.json"
LOCK = "run.lock"
PLOTS = ("accuracy", "filters")


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
        config: learning rate, epochs, folder and so on. Default: method czmig for 40 epochs. Its
            batch size, crops and flips are those of its `dataset`, which should be imagefolder
            where `data` is a folder.
        resume: True goes on from the checkpoint in the folder of the run, if there is one, to the
            epochs of `config`, at the checkpoint's milestones where `config` has none.
        overwrite: True replaces the run in that folder, if there is one.

    Raises:
        TrainingError: an option or the data do not fit, or the folder holds something else.
        DivergedError: the loss is not finite.
    """
    name = type(model).__name__
    is_folder = isinstance(data, (str, Path))
    config = config or Config(dataset="imagefolder" if is_folder else "digits")
    config = replace(config, out=config.out or f"runs/{name.lower()}")
    if is_folder:
        config, data = replace(config, dataset="imagefolder", data_dir=str(data)), None
    elif distributed.is_launched() or config.cuda_graph:
        raise TrainingError("a DataLoader is for one process without cuda_graph: give a folder")
    resumed = existing(config) if resume else None
    if resumed and config.milestones is None and config.schedule == "steps":
        # Their default follows the epochs, which a run that goes on may have more of.
        saved = from_saved(checkpoint.load(resumed).get("config"))
        config = replace(config, milestones=saved.milestones)
    return run(config, resume=resumed, overwrite=overwrite, model=model, loaders=data)


def existing(config: Config) -> Path | None:
    """Return the checkpoint of the run, if there is one."""
    file = config.run_folder / checkpoint.FILE_NAME
    return file if file.exists() else None


def read_summary(config: Config) -> dict[str, Any] | None:
    """Return the summary of the run, if it is complete and was trained with these options."""
    file = config.run_folder / SUMMARY
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return None if difference(found, config.as_dict(), LOCAL) else found


def run(
    config: Config,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    model: nn.Module | None = None,
    loaders: Any = None,
) -> TrainingResult:
    """Train as `config` says into the folder of the run.

    Nothing is written before the data are read and the network is built, and then a checkpoint
    before all else and after each epoch. Of the processes of `torchrun`, the first writes.

    Args:
        resume: checkpoint to go on from; its run may be replaced by what follows.
        overwrite: True replaces the run that the folder holds.
        on_epoch: called with the record of each epoch once its checkpoint is written.
        model: the user's network; None builds the config's.
        loaders: the user's DataLoaders; None loads the config's data set.

    Raises:
        CheckpointError: the run cannot go on from `resume`.
        TrainingError: something else does not fit; the message says what.
    """
    config = config.checked()
    folder = config.run_folder
    if resume is None or resume.resolve() != (folder / checkpoint.FILE_NAME).resolve():
        check_folder(folder, overwrite)
    device = pick_device(config.device)
    check_options(config, device)
    with distributed.joined(device) as ranks:
        digest = None
        if loaders is None:
            with ranks.in_turn():
                images = data.load(config)
            digest, loaders = images.digest(), images.to(device)
        try:
            trainer = Trainer(config, loaders, device, ranks, model)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        history = _go_on(trainer, resume, digest) if resume is not None else []
        # Of the user's; figures of Table 1 are of the config's networks alone.
        network = None if model is None else type(model).__name__
        writes = ranks.rank == 0

        def save() -> None:
            # Every rank takes part in its trainer's state.
            state = {
                "trainer": trainer.state_dict(),
                "config": config.as_dict(),
                "data": digest,
                "network": network,
            }
            if writes:
                checkpoint.save(folder / checkpoint.FILE_NAME, {**state, "history": history})

        with ExitStack() as stack:
            if writes:
                stack.enter_context(locked(folder))
                _remove_old_files(folder, keep_events=bool(history))
            # First of all files: it tells that the folder is a run of czm-train.
            save()
            stack.enter_context(_resumable(folder, history, network))
            log = stack.enter_context(closing(metrics.Log(folder, history))) if writes else None
            while trainer.epoch < config.epochs:
                record = _epoch(trainer)
                history.append(record)
                if log is not None:
                    # Before the checkpoint: a run that is resumed removes the records beyond it.
                    log.add(history)
                save()
                if writes:
                    print(metrics.describe(record, config.epochs), flush=True)
                if on_epoch is not None:
                    on_epoch(record)
            summary = {**config.as_dict(), "seconds": sum(each["seconds"] for each in history)}
            summary |= {name: x for name, x in history[-1].items() if name.endswith("accuracy")}
            summary |= {"network": network} if network else {}
            result = TrainingResult(folder, history, trainer.model, summary)
            if writes:
                name = network or plots.name_network(summary)
                _write_results(result, f"{name}, {config.method}")
    return result


def _go_on(trainer: Trainer, source: Path, digest: str | None) -> list[dict[str, Any]]:
    """Load the checkpoint at `source` into `trainer`; return the records of its epochs.

    `digest` is that of the images, None for the user's DataLoaders.
    """
    try:
        saved = checkpoint.load(source)
        check_resumed(trainer.config, from_saved(saved["config"]))
        if saved.get("data", digest) != digest:
            raise TrainingError(
                "the checkpoint was trained on other images than there are now: give their "
                "--data-dir, or start without --resume"
            )
        epochs = len(saved["history"])
        if epochs > trainer.config.epochs:
            raise TrainingError(
                f"the checkpoint has been trained for {epochs} epochs, and --epochs is "
                f"{trainer.config.epochs}: give more, or start without --resume"
            )
        trainer.load_state_dict(saved["trainer"])
    except TrainingError as error:
        raise CheckpointError(f"{source.parent}: {error}") from error
    return list(saved["history"])


def _epoch(trainer: Trainer) -> dict[str, Any]:
    started = time.perf_counter()
    record: dict[str, Any] = {"epoch": trainer.epoch + 1, "lr": trainer.lr}
    record["train_loss"], record["train_accuracy"], images = trainer.train_epoch()
    record["images_per_second"] = images / (time.perf_counter() - started)
    if trainer.batches.has_test:
        record["test_loss"], record["test_accuracy"], _ = trainer.test()
    record["seconds"] = time.perf_counter() - started
    norms = direction_norms(trainer.model, trainer.optimizer)
    if not norms.isfinite().all():
        # Of the last step, whose loss nobody has computed.
        raise DivergedError(f"the weights became infinite or NaN in epoch {trainer.epoch}")
    if len(norms):
        record["filter_norms"] = metrics.quantiles(norms)
        record["collapsed_filters"] = metrics.collapsed(norms)
        has_convolutions = bool(named_convolutions(trainer.model))
        if has_convolutions and metrics.rejection_is_due(trainer.epoch, trainer.config.epochs):
            record["rejection_db"] = trainer.rejection()
    return record


@contextmanager
def _resumable(folder: Path, history: Sequence[Any], network: str | None) -> Iterator[None]:
    """Say in errors of the block how to go on from the checkpoint in `folder`."""
    command = "train(..., resume=True)" if network else f"czm-train --resume {folder}"
    try:
        yield
    except DivergedError as error:
        raise DivergedError(
            f"{error}; {folder / checkpoint.FILE_NAME} holds the run after epoch {len(history)}; "
            "lower learning rates may help"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: {command}") from None


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise TrainingError unless the folder is free, or holds a run that may be replaced."""
    files = folder.iterdir() if folder.exists() else ()
    names = {path.name for path in files if path.suffix != checkpoint.DRAFT_SUFFIX} - {LOCK}
    if not names:
        return
    if checkpoint.FILE_NAME not in names:
        raise TrainingError(
            f"--out {folder} holds other files ({min(names)}) and no run: choose an empty folder"
        )
    if not overwrite:
        raise TrainingError(
            f"--out {folder} holds a run: continue it with --resume, replace it with --overwrite, "
            "or choose another --out"
        )
    checkpoint.load(folder)  # refuses to replace the file of another program


def _remove_old_files(folder: Path, keep_events: bool) -> None:
    """Remove what another run, or the one that is resumed, has left in its folder."""
    names = [SUMMARY, *(f"{name}.{kind}" for name in PLOTS for kind in get_args(PlotFormat))]
    events = [] if keep_events else folder.glob(f"events.*{metrics.EVENTS_SUFFIX}")
    # A process that was killed leaves drafts; whoever holds the folder's lock writes none now.
    drafts = folder.glob(f"*{checkpoint.DRAFT_SUFFIX}")
    for file in (*(folder / name for name in names), *events, *drafts):
        file.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder of a run, once or more in one process; the lock ends with the process.

    `wait` waits for another process that holds it, where otherwise TrainingError is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        with lock.acquire(timeout=-1 if wait else 0):
            yield
    except Timeout as error:
        raise TrainingError(
            f"another process trains in --out {folder}: wait for it, or choose another --out"
        ) from error


def check_options(config: Config, device: torch.device) -> None:
    """Raise TrainingError, with the remedy, where an option of speed has nothing to act on."""
    for name in ("cuda_graph", "tf32"):
        if getattr(config, name) and device.type != "cuda":
            raise TrainingError(
                f"{option(name)} needs --device cuda, and this is a run on {device.type}: leave it "
                "out here; --channels-last, --autocast bfloat16 and --compile act everywhere"
            )
    if distributed.is_launched() and config.cuda_graph:
        raise TrainingError("--cuda-graph is for a single process: leave it out under torchrun")
    if uses_czm(config):
        with explained(f"--backend {config.backend} cannot run here"):
            backends.choose(device, config.backend)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `"auto"` is a GPU if there is one, else the CPU.

    Each of several processes that `torchrun` starts on a machine takes a GPU of its own.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if found is None or found.type == "mps" else found.type
    with explained(f"--device {name} is not available here", "use --device cpu, or auto"):
        device = torch.device(name)
        if device.type == "mps":
            raise RuntimeError("czm-train trains on CPUs and CUDA GPUs")
        if device.type != "cpu" and device.index is None:
            index = os.environ.get("LOCAL_RANK", torch.accelerator.current_device_index())
            device = torch.device(device.type, int(index))
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        torch.ones(1, device=device).item()
    return device


def _write_results(result: TrainingResult, title: str) -> None:
    folder, summary = result.folder, result.summary
    try:
        plots.draw_run(folder, summary["plot_format"], result.history, title)
    except OSError:
        raise
    except Exception as error:  # a broken plotting library must not lose the run
        reason = " ".join(str(error).split())
        print(f"czm-train: warning: cannot draw the plots: {reason}", file=sys.stderr)
    # Last, because it is the sign of a complete run.
    with replacing(folder / SUMMARY) as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    part = "test" if "test_accuracy" in summary else "train"
    print(
        f"{title}: {summary[f'{part}_accuracy']:.2f} % {part} accuracy in the final epoch "
        f"({summary['epochs']}), {summary['seconds']:.0f} s; see {folder}",
        flush=True,
    )
