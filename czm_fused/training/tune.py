"""`czm-train tune`: a search of the rates, the gain and the noise on held-out images."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from . import data
from .cli import parse, to_arguments
from .config import WITHOUT_EFFECT, Config, option
from .errors import TrainingError
from .run import pick_device
from .study import StudyOptions, first_number, open_study, work

# Name, range and True where the scale is logarithmic.
SEARCHED: dict[str, tuple[float, float, bool]] = {
    "lr": (0.01, 2.0, True),
    "head_lr": (0.01, 2.0, True),
    "zmg": (0.5, 1.0, False),
    "gain": (0.4, 2.0, True),
    "noise": (0.0, 0.4, False),
}


@dataclass(frozen=True, kw_only=True)
class Tune(StudyOptions):
    """Search lr, head lr, zmg, gain and noise, as far as the method has them, on held-out images.

    Trials are chosen by TPE and pruned against the median. Interrupted or killed, the same command
    goes on where it was; started several times, it shares the work. All options of czm-train
    apply; without --hold-out, a tenth of the training images is held out."""

    folder: str = "runs/tune"
    """Holds a folder for each trial and the study."""
    trials: int = 50
    """Trials of the study, over all workers."""


def main(arguments: Sequence[str]) -> None:
    """Train the trials, or what is left of them, and print the command of the best settings.

    Raises:
        TrainingError: the input is bad, or no trial could be trained.
    """
    options = parse(Tune, arguments, prog="czm-train tune")
    # --noise-on needs noise, which the trials search.
    replace(options, noise=options.noise or SEARCHED["noise"][1]).checked()
    pick_device(options.device)
    given = Config(method=options.method, dataset=options.dataset)
    for name in (*SEARCHED, "out"):
        if getattr(options, name) != getattr(given, name):
            raise TrainingError(f"{option(name)} is set by the search for each trial: leave it out")
    # Before the study is begun, as another command could not join it then.
    images = data.load(options)
    held = options.hold_out or max(1, len(images.train) // 10)
    base = replace(options, hold_out=held)
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=max(1, options.epochs // 5))
    study = open_study("tune", options, {"options": base}, images.digest(), pruner)

    def config_of(trial: optuna.Trial) -> Config:
        values: dict[str, Any] = {
            name: trial.suggest_float(name, low, high, log=log)
            for name, (low, high, log) in SEARCHED.items()
            if name not in WITHOUT_EFFECT[options.method]
        }
        number = first_number(study, trial.number)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        print(f"\ntrial {number}: {shown}", flush=True)
        return replace(base, **values, out=str(Path(options.folder, f"trial-{number}")))

    passed_over = work(study, config_of, options.heartbeat, options.trials)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        reason = passed_over[0] if passed_over else "all diverged"
        raise TrainingError(f"no trial was trained to its end: {reason}")
    best = study.best_trial
    found: dict[str, Any] = {name: float(f"{value:.3g}") for name, value in best.params.items()}
    config = replace(options, **found)
    default = Config(method=options.method, dataset=options.dataset)
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(Config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    changed |= {"method": config.method, "dataset": config.dataset}
    print(
        f"\nbest of {len(complete)} complete trials ({len(study.trials)} begun): trial "
        f"{first_number(study, best.number)}, {best.value:.2f} % on {held} held-out images\n"
        f"{shlex.join(['czm-train', *to_arguments(changed)])}",
        flush=True,
    )
