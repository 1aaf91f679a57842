"""An Optuna study whose trials are runs of czm-train, shared by any number of workers."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError

from . import distributed
from .cli import Options
from .config import LOCAL, Config, difference
from .errors import CheckpointError, DivergedError, TrainingError, explained
from .run import existing, locked, read_summary, run

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """The options of a study and of its runs."""

    folder: str = "runs"
    """Holds a folder for each run, and the study."""
    storage: str | None = None
    """URL of the study's data base, as postgresql://host/name, for machines without a common
    folder (default: a file in --folder)."""
    heartbeat: int = 60
    """Seconds between a worker's signs of life; one silent for twice as long has its run taken."""


def open_study(
    name: str,
    options: StudyOptions,
    protocol: Mapping[str, Config] | None,
    digest: str = "",
    pruner: optuna.pruners.BasePruner | None = None,
) -> optuna.Study:
    """Create or join the study `name`, if it was begun with the same protocol and images.

    `protocol` is the configs that all workers must agree on, by name; None joins any study.
    `digest` is that of the images.
    """
    if distributed.is_launched():
        raise TrainingError(
            f"{name} trains each run in one process: instead of torchrun, start it several times"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    folder = Path(options.folder)
    file = folder / f"{name}.db"
    if not options.storage and not file.exists() and folder.is_dir() and any(folder.iterdir()):
        raise TrainingError(f"--folder {folder} holds files and no {file.name}: empty it")
    folder.mkdir(parents=True, exist_ok=True)
    url = options.storage or f"sqlite:///{file}"
    remedy = "check --storage and its driver, or leave it out for a file in --folder"
    with explained(f"cannot reach the storage {url}", remedy):
        study = optuna.create_study(
            storage=_connect(url, options.heartbeat),
            pruner=pruner or optuna.pruners.NopPruner(),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        if protocol is None:
            return study
        ignored = {*LOCAL, "seed"}
        shared = {
            row: {key: value for key, value in config.as_dict().items() if key not in ignored}
            for row, config in protocol.items()
        }
        if "protocol" not in study.user_attrs:
            study.set_user_attr("protocol", {"format": FORMAT, "rows": shared, "data": digest})
        saved = study.user_attrs["protocol"]
    if saved["format"] != FORMAT:
        raise TrainingError(
            f"the study in {url} was begun by another version of czm-train: go on with that "
            "version, or choose another --folder"
        )
    if saved.get("data", digest) != digest:
        raise TrainingError(
            f"the study in {url} was begun with other images: give their --data-dir, or choose "
            "another --folder"
        )
    for row, values in shared.items():
        if found := difference(saved["rows"][row], values, ()):
            raise TrainingError(
                f"the study in {url} was begun with {found} ({row}): give the same options, or "
                "choose another --folder"
            )
    return study


def _connect(url: str, heartbeat: int) -> optuna.storages.RDBStorage:
    # SQLite makes writers wait for each other; a server knows no such argument.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    connect = partial(
        optuna.storages.RDBStorage,
        url,
        engine,
        heartbeat_interval=heartbeat,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )
    for _ in range(10):
        # Workers that start together create the tables together, and all but one fail.
        with suppress(DBAPIError):
            return connect()
        time.sleep(0.2)
    return connect()


def first_number(study: optuna.Study, number: int) -> int:
    """Return the number of the trial that began the run of the trial `number`."""
    history: list[int] = study.trials[number].system_attrs.get("retry_history", [])
    return history[0] if history else number


def work(
    study: optuna.Study,
    config_of: Callable[[optuna.Trial], Config | None],
    heartbeat: int,
    trials: int = 0,
) -> list[str]:
    """Train trials until none is left, and no other worker that may die holds one.

    Returns the reasons for which runs were passed over.

    Args:
        config_of: returns the config of a trial's run; None where another trial has the run.
        trials: how many to begin beside those that wait in the study.
    """
    reasons: list[str] = []

    def objective(trial: optuna.Trial) -> float:
        def report(record: dict[str, Any]) -> None:
            trial.report(record["test_accuracy"], record["epoch"])
            if trial.should_prune():
                print(f"pruned after epoch {record['epoch']}", flush=True)
                raise optuna.TrialPruned

        try:
            config = config_of(trial)
            if config is None:
                return math.nan  # which Optuna counts as failed
            # A worker that counted as dead may train on: until it has noticed, it holds the lock.
            with locked(config.run_folder, wait=True):
                summary = read_summary(config)
                if summary is None:
                    summary = run(config, resume=existing(config), on_epoch=report).summary
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
            raise optuna.TrialPruned(str(error)) from error
        except CheckpointError as error:
            reasons.append(str(error))
            print(f"passed over: {error}", flush=True)
            raise
        except KeyboardInterrupt:
            RetryHeartbeatStaleTrialCallback()(study, study.trials[trial.number])
            raise KeyboardInterrupt("the same command goes on from here") from None
        return float(summary["test_accuracy"])

    told = False
    while True:
        optuna.storages.fail_stale_trials(study)
        counts = Counter(trial.state for trial in study.get_trials(deepcopy=False))
        begun = counts.total() - counts[TrialState.WAITING] - counts[TrialState.FAIL]
        if counts[TrialState.WAITING] or begun < trials:
            told = False
            try:
                lost = (CheckpointError, optuna.exceptions.UpdateFinishedTrialError)
                study.optimize(objective, n_trials=1, catch=lost)
            except ValueError as error:
                # A worker that counted as dead, for instance while suspended, has its results
                # refused: whoever retries the trial resumes its checkpoint, or finds it complete.
                if "Cannot tell" not in str(error):
                    raise
        elif not counts[TrialState.RUNNING]:
            return reasons
        else:
            if not told:
                told = True
                print(
                    f"waiting for {counts[TrialState.RUNNING]} runs of other workers (those of a "
                    f"worker that is silent for {2 * heartbeat} s are taken up here)",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(min(5.0, heartbeat))
