"""An Optuna study whose trials are runs of czm-train, shared by any number of workers."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint, distributed
from ..config import ResolvedConfig, check_resumed, from_saved
from ..errors import TrainingError, require
from ..run import (
    SUMMARY,
    OnEpoch,
    TrainingResult,
    locked,
    pick_device,
    prepare_folder,
    run,
)

if TYPE_CHECKING:
    import optuna

FORMAT = 1
HEARTBEAT = 60
"""Seconds between two signs of life of a worker; one silent for twice as long counts as dead."""
_RETRY_OF = "retry_of"


class PassedOver(TrainingError):
    """One run of a study cannot be trained here; the others can. No message: it need not be."""


def open_study(
    name: str,
    folder: Path,
    storage: str | None,
    protocol: dict[str, Any] | None,
    heartbeat: int = HEARTBEAT,
    **options: Any,
) -> optuna.Study:
    """Create or join the study `name`.

    Args:
        folder: of the runs; the study's SQLite file goes there if `storage` is None.
        storage: SQLAlchemy URL of a data base that several machines reach.
        protocol: plain values that all workers must agree on; None joins any.
        heartbeat: seconds between two signs of life.
        options: for `optuna.create_study`.

    Raises:
        TrainingError: the storage cannot be reached, the folder holds something else, or the study
            was begun with another protocol.
    """
    require("optuna", "sqlalchemy", "filelock")
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if distributed.is_launched():
        raise TrainingError(
            f"{name} trains each run in one process: instead of torchrun, start it several times"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    file = folder / f"{name}.db"
    if folder.is_dir() and any(folder.iterdir()) and storage is None and not file.exists():
        raise TrainingError(f"--folder {folder} holds files and no {file.name}: empty it")
    url = storage or f"sqlite:///{file}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        study = _join(name, url, heartbeat, options)
        wanted = json.loads(json.dumps({"format": FORMAT, **(protocol or {})}))
        if protocol is not None and "protocol" not in study.user_attrs:
            study.set_user_attr("protocol", wanted)
    except (SQLAlchemyError, OSError, ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"cannot reach the storage {url} ({reason}): check --storage and its driver, or leave "
            "it out for a file in --folder"
        ) from error
    if protocol is not None:
        _check_protocol(study, wanted, storage or str(file))
    return study


def _join(name: str, url: str, heartbeat: int, options: dict[str, Any]) -> optuna.Study:
    import optuna
    from sqlalchemy.exc import DBAPIError

    # SQLite makes writers wait for each other; a server knows no such argument.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    attempts = 10
    while True:
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=heartbeat,
                heartbeat_stale_trial_callback=enqueue_again,
            )
            return optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, direction="maximize",
                **options,
            )  # fmt: skip
        except DBAPIError as error:
            # Workers that start together create the tables together, and all but one fail.
            is_race = any(word in str(error).lower() for word in ("exists", "unique", "duplicate"))
            attempts -= 1
            if not is_race or not attempts:
                raise
            time.sleep(0.2)


def _check_protocol(study: optuna.Study, wanted: dict[str, Any], place: str) -> None:
    saved = study.user_attrs["protocol"]
    if saved.get("format") != wanted["format"] or saved.keys() != wanted.keys():
        raise TrainingError(
            f"the study in {place} was begun by another version of czm-train: go on with that "
            "version, or choose another --folder"
        )
    for row, options in wanted.items():
        for name, value in options.items() if isinstance(options, dict) else ():
            before = saved[row].get(name) if isinstance(saved[row], dict) else None
            if before != value:
                raise TrainingError(
                    f"the study in {place} was begun with --{name.replace('_', '-')} {before}, not "
                    f"{value} ({row}): give the same options, or choose another --folder"
                )


def enqueue_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Enqueue a trial that lost its worker; its run goes on from the checkpoint."""
    attributes = {**trial.user_attrs, _RETRY_OF: first_number(trial)}
    study.enqueue_trial(trial.params, user_attrs=attributes)


def first_number(trial: optuna.trial.FrozenTrial | optuna.Trial) -> int:
    """Return the number of the trial that began the run."""
    return int(trial.user_attrs.get(_RETRY_OF, trial.number))


def work(
    study: optuna.Study,
    train: Callable[[optuna.Trial], float],
    is_open: Callable[[], bool],
    heartbeat: int = HEARTBEAT,
) -> list[str]:
    """Train trials until none is left, and no other worker that may die holds one.

    Args:
        train: trains a trial and returns its value.
        is_open: returns whether a trial can be asked for now.
        heartbeat: as for `open_study`.

    Returns:
        The reasons for which runs were passed over.

    Raises:
        TrainingError: no run can start or go on.
    """
    import optuna

    reasons: list[str] = []
    has_lost_trial = False

    def objective(trial: optuna.Trial) -> float:
        nonlocal has_lost_trial
        has_lost_trial = False
        try:
            value = train(trial)
            has_lost_trial = True  # if optuna refuses the value
            return value
        except PassedOver as error:
            has_lost_trial = True
            if str(error):
                reasons.append(str(error))
                print(f"passed over: {error}", flush=True)
            raise
        except optuna.exceptions.UpdateFinishedTrialError as error:
            has_lost_trial = True
            raise PassedOver from error
        except KeyboardInterrupt:
            enqueue_again(study, study.trials[trial.number])
            raise

    told = False
    while True:
        optuna.storages.fail_stale_trials(study)
        if is_open():
            told = False
            try:
                study.optimize(objective, n_trials=1, catch=(PassedOver,))
            except ValueError:
                # Counted as dead, for instance while suspended: whoever retries the trial resumes
                # its checkpoint, or finds the run complete.
                if not has_lost_trial:
                    raise
            continue
        running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        if not running:
            return reasons
        if not told:
            told = True
            print(
                f"waiting for {len(running)} runs of other workers (those of a worker that is "
                f"silent for {2 * heartbeat} s are taken up here)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(min(5.0, heartbeat))


def train_or_resume(
    config: ResolvedConfig, on_epoch: OnEpoch | None = None
) -> TrainingResult | dict[str, Any]:
    """Train a run, or what is left of it; return its result, or the summary of a complete one.

    Raises:
        PassedOver: what the folder of the run holds cannot be resumed here.
        TrainingError: no run can start or go on.
        DivergedError: the loss is not finite.
    """
    folder = Path(config.out)
    # A worker that counted as dead may train on: until it has noticed, it holds the lock.
    with locked(folder, wait=True):
        resumed = None
        if (folder / checkpoint.FILE_NAME).exists():
            try:
                resumed = checkpoint.load(folder)
                check_resumed(config, from_saved(resumed.get("config")))
                begun, here = resumed["trainer"]["device_type"], pick_device(config.device).type
            except (TrainingError, LookupError, TypeError) as error:
                raise PassedOver(f"{folder}: {error}") from error
            if (folder / SUMMARY).exists():
                summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
                return summary
            if begun != here:
                raise PassedOver(f"{folder}: begun on {begun}, and this worker trains on {here}")
        prepare_folder(config, may_replace=resumed is not None)
        return run(config, resumed=resumed, on_epoch=on_epoch)
