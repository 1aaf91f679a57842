"""`czm-train tune`: a search of the rates, the gain and the noise on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import command_of, parse_options, read
from ..config import WITHOUT_EFFECT, Config, defaults_of
from ..errors import DivergedError, TrainingError
from ..run import TrainingResult, pick_device
from . import study as studies
from .rows import shared

if TYPE_CHECKING:
    import optuna

# Name, range and True where the scale is logarithmic.
SEARCHED: dict[str, tuple[float, float, bool]] = {
    "lr": (0.01, 2.0, True),
    "head_lr": (0.01, 2.0, True),
    "zmg": (0.5, 1.0, False),
    "gain": (0.4, 2.0, True),
    "noise": (0.0, 0.4, False),
}


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search lr, head lr, zmg, gain and noise, as far as the method has them, on held-out images.

    Trials are chosen by TPE and pruned against the median. Interrupted or killed, the same command
    goes on where it was; started several times, it shares the work. All options of czm-train
    apply; without --hold-out, a tenth of the training images is held out."""

    folder: str = "runs/tune"
    """Holds a folder for each trial and the study."""
    trials: int = 50
    """Trials of the study, over all workers."""
    storage: str | None = None
    """URL of the study's data base, for machines without a common folder (default: tune.db in
    --folder)."""
    heartbeat: int = studies.HEARTBEAT
    """Seconds between a worker's signs of life; one silent for twice as long has its run taken."""


def main(arguments: Sequence[str]) -> None:
    """Train the trials, or what is left of them, and print the command of the best settings.

    Raises:
        TrainingError: the input is bad, or no trial could be trained.
        SystemExit: tyro's.
    """
    known, others = read(Tune, arguments, prog="czm-train tune", return_unknown_args=True)
    for name in ("trials", "heartbeat"):
        if getattr(known, name) < 1:
            raise TrainingError(f"--{name} must be at least 1, but was {getattr(known, name)}")
    import optuna
    from optuna.trial import TrialState

    options = parse_options(others)
    base = options.resolve()
    pick_device(base.device)
    if not base.hold_out:
        from ..data import load

        options = replace(options, hold_out=max(1, len(load(base).train) // 10))
        base = options.resolve()
    names = [name for name in SEARCHED if name not in WITHOUT_EFFECT[base.method]]
    folder = Path(known.folder)
    study = studies.open_study(
        "tune",
        folder,
        known.storage,
        {"options": shared(base)},
        known.heartbeat,
        sampler=optuna.samplers.TPESampler(),
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=max(1, base.epochs // 5)),
    )
    done = (TrialState.COMPLETE, TrialState.PRUNED)

    def train(trial: optuna.Trial) -> float:
        values: dict[str, Any] = {}
        for name in names:
            low, high, log = SEARCHED[name]
            values[name] = trial.suggest_float(name, low, high, log=log)
        number = studies.first_number(trial)
        out = str(folder / f"trial-{number}")
        print(f"\ntrial {number}: {_describe(values)}", flush=True)

        def report(record: dict[str, Any]) -> None:
            trial.report(record["test_accuracy"], record["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = studies.train_or_resume(
                replace(options, **values, out=out).resolve(), report
            )
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
            raise optuna.TrialPruned(str(error)) from error
        summary = result.summary if isinstance(result, TrainingResult) else result
        return float(summary["test_accuracy"])

    def is_open() -> bool:
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        begun = study.get_trials(deepcopy=False, states=(*done, TrialState.RUNNING))
        return bool(waiting) or len(begun) < known.trials

    passed_over = studies.work(study, train, is_open, known.heartbeat)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        reason = passed_over[0] if passed_over else "all diverged"
        raise TrainingError(f"no trial was trained to its end: {reason}")
    best = study.best_trial
    found: dict[str, Any] = {name: float(f"{value:.3g}") for name, value in best.params.items()}
    held = Config.hold_out if "--hold-out" not in " ".join(others) else base.hold_out
    command = command_of(
        replace(options, **found, hold_out=held), defaults_of(base.method, base.dataset)
    )
    print(
        f"\nbest of {len(complete)} complete trials ({len(study.trials)} begun): trial "
        f"{studies.first_number(best)}, {best.value:.2f} % on {base.hold_out} held-out images\n"
        f"{command}",
        flush=True,
    )


def _describe(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
