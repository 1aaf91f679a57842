"""`czm-train table1`: the rows of Table 1 as trials of a study, and the table of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import read
from ..errors import DivergedError, TrainingError, require
from ..run import TrainingResult, pick_device
from . import study as studies
from .rows import TABLE1, find, shared

if TYPE_CHECKING:
    import optuna

DEFAULT_FOLDER = "runs/table1"


@dataclass(frozen=True, kw_only=True)
class Table1:
    """Train the rows of the paper's Table 1, by default ResNet110 on CIFAR-10, and print the table.

    Interrupted or killed, the same command goes on where it was; started several times, on one
    device or on many machines, it shares the work. All options of czm-train apply to all runs, but
    --weight-decay to BatchNorm alone, and --head-lr, --luma, --classifier-luma, --residual-bias,
    --gain and --stem to the other rows. optuna-dashboard shows the study."""

    folder: str = DEFAULT_FOLDER
    """Holds a folder for each run, the study and the table."""
    seeds: int = 8
    """Train seeds 0 to this minus 1."""
    rows: tuple[str, ...] = ()
    """Names as in czmig-lr0.4-zmg0.85-noise0.1 (default: all eleven)."""
    report: bool = False
    """Train nothing; print the table of the complete runs."""
    storage: str | None = None
    """URL of the study's data base, as postgresql://host/name, for machines without a common
    folder (default: table1.db in --folder)."""
    heartbeat: int = studies.HEARTBEAT
    """Seconds between a worker's signs of life; one silent for twice as long has its run taken."""


def main(arguments: Sequence[str]) -> None:
    """Train the rows of Table 1, or what is left of them, and print the table.

    Raises:
        TrainingError: the input is bad, or a run could not be trained.
        SystemExit: tyro's.
    """
    known, others = read(
        Table1, arguments, prog="czm-train table1", return_unknown_args=True
    )
    rows = find(known.rows) if known.rows else list(TABLE1)
    for name in ("seeds", "heartbeat"):
        if getattr(known, name) < 1:
            raise TrainingError(f"--{name} must be at least 1, but was {getattr(known, name)}")
    require("scipy", "pandas")
    from .report import write_report

    folder = Path(known.folder)
    if known.report and others:
        raise TrainingError(f"{others[0]} has no effect on --report: leave it out")
    configs = {row.name: row.config(others) for row in TABLE1}
    if known.report:
        if not (known.storage or (folder / "table1.db").exists()):
            raise TrainingError(f"there is no study in --folder {folder}: train it first")
        study = studies.open_study("table1", folder, known.storage, None)
        print(write_report(study, folder))
        return
    pick_device(configs[rows[0].name].device)
    protocol = {name: shared(config) for name, config in configs.items()}
    study = studies.open_study("table1", folder, known.storage, protocol, known.heartbeat)
    wanted = [(row.name, seed) for seed in range(known.seeds) for row in rows]
    for row, seed in wanted:
        if not _trials(study, row, seed):
            study.enqueue_trial({}, user_attrs={"row": row, "seed": seed})

    def train(trial: optuna.Trial) -> float:
        import optuna

        row, seed = trial.user_attrs.get("row", ""), trial.user_attrs.get("seed", -1)
        if not row or _trials(study, row, seed)[0].number != trial.number:
            raise studies.PassedOver()  # two workers enqueued the run at once
        print(f"\n{row}, seed {seed}", flush=True)
        out = folder / row / f"seed-{seed}"
        config = replace(configs[row], seed=seed, out=str(out))

        def report(record: dict[str, Any]) -> None:
            trial.report(record["test_accuracy"], record["epoch"])

        try:
            result = studies.train_or_resume(config, report)
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
            trial.set_user_attr("diverged", str(error))
            raise optuna.TrialPruned(str(error)) from error
        summary = result.summary if isinstance(result, TrainingResult) else result
        trial.set_user_attr("summary", summary)
        return float(summary["test_accuracy"])

    def is_open() -> bool:
        from optuna.trial import TrialState

        return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    passed_over = studies.work(study, train, is_open, known.heartbeat)
    print("\n" + write_report(study, folder))
    if passed_over:
        raise TrainingError(f"passed over {len(passed_over)} runs, the first {passed_over[0]}")


def _trials(study: optuna.Study, row: str, seed: int) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a run that were not lost, the one that counts first."""
    from optuna.trial import TrialState

    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("row") == row
        and trial.user_attrs.get("seed") == seed
        and trial.state != TrialState.FAIL
    ]
