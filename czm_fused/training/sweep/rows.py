"""The rows of the paper's Table 1: what each one trains, and what the paper measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..settings import FREE_ON_RESUME, Settings, option, resolve
from .statistics import Summary

# The paper's network and data; the schedule and the batch are the defaults of the data set.
DEFAULTS = {"dataset": "cifar10", "depth": 110}

# May differ between the processes of a sweep: where and how they compute, not what.
LOCAL = FREE_ON_RESUME - {"epochs"}

ROW_SETTINGS = ("method", "lr", "zmg", "noise")

_SET_BY_THE_SWEEP = (*ROW_SETTINGS, "seed", "out", "resume", "overwrite")
_BATCHNORM_ONLY = {"weight_decay"}
_CZM_ONLY = {"head_lr", "luma", "classifier_luma", "residual_bias", "gain", "stem"}


@dataclass(frozen=True)
class Row:
    """A row of Table 1.

    Attributes:
        paper: the test accuracies that the paper reports, %.
    """

    method: str
    lr: float
    zmg: float
    noise: float
    paper: Summary

    @property
    def name(self) -> str:
        """What `--rows` and the folders call it, as in `czmig-lr0.4-zmg0.85-noise0.1`."""
        parts = [f"{self.method}-lr{self.lr:g}"]
        if self.method == "czmig":
            parts.append(f"zmg{self.zmg:g}")
        if self.method != "bn":
            parts.append(f"noise{self.noise:g}")
        return "-".join(parts)

    @property
    def title(self) -> str:
        """The row for people, as in `CZMIG, lr 0.4, zmg 0.85, noise 0.1`."""
        if self.method == "bn":
            return f"BatchNorm, lr {self.lr:g}"
        zmg = f", zmg {self.zmg:g}" if self.method == "czmig" else ""
        return f"{self.method.upper()}, lr {self.lr:g}{zmg}, noise {self.noise:g}"

    def settings(self, given: dict[str, Any], seed: int, out: Path) -> Settings:
        """Return the settings of one run.

        Args:
            given: options for all rows; those that a method does not have are left out for it.

        Raises:
            TrainingError: a value is out of range.
        """
        foreign = _CZM_ONLY if self.method == "bn" else _BATCHNORM_ONLY
        kept = {name: value for name, value in given.items() if name not in foreign}
        own = {"method": self.method, "lr": self.lr, "noise": self.noise}
        if self.method == "czmig":
            own["zmg"] = self.zmg
        return resolve({**DEFAULTS, **kept, **own, "seed": seed, "out": str(out)})

    def protocol(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that all runs of the row share, wherever they are trained."""
        return shared(self.settings(given, 0, Path()).as_dict())

    def trained(self, settings: dict[str, Any]) -> bool:
        """Return whether a run with these settings is one of the row."""
        return all(settings.get(name) == getattr(self, name) for name in ROW_SETTINGS)


def _paper(mean: float, sd: float) -> Summary:
    return Summary(n=8, mean=mean, sd=sd)


BATCHNORM = Row("bn", 0.1, 0.0, 0.0, _paper(93.70, 0.55))

# The paper contradicts itself on the last row's method; a zmg of 1 has a meaning for CZMIG alone.
TABLE1 = (
    Row("czmig", 0.4, 0.85, 0.1, _paper(94.03, 0.14)),
    BATCHNORM,
    Row("czmig", 0.4, 0.98, 0.1, _paper(93.64, 0.11)),
    Row("czmig", 0.4, 0.85, 0.0, _paper(93.57, 0.12)),
    Row("czmig", 0.2, 0.85, 0.0, _paper(93.44, 0.18)),
    Row("czmi", 0.4, 0.0, 0.1, _paper(93.33, 0.11)),
    Row("czmi", 0.1, 0.0, 0.0, _paper(93.06, 0.22)),
    Row("czmi", 0.2, 0.0, 0.0, _paper(92.95, 0.23)),
    Row("czmi", 0.4, 0.0, 0.0, _paper(92.13, 0.26)),
    Row("czmig", 0.1, 0.85, 0.0, _paper(92.95, 0.20)),
    Row("czmig", 0.1, 1.0, 0.1, _paper(91.03, 0.25)),
)


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that do not depend on the seed and the machine."""
    return {name: value for name, value in settings.items() if name not in LOCAL and name != "seed"}


def check_given(given: dict[str, Any]) -> None:
    """Check the options of `czm-train` that a sweep was given.

    Raises:
        TrainingError: one of them is the sweep's to set.
    """
    for name in _SET_BY_THE_SWEEP:
        if name in given:
            raise TrainingError(
                f"{option(name)} is set by table1 for each run: leave it out "
                "(--rows and --seeds choose the runs, and the same command resumes them)"
            )


def find(names: list[str]) -> list[Row]:
    """Return the rows called `names`, in that order.

    Raises:
        TrainingError: there is no such row.
    """
    by_name = {row.name: row for row in TABLE1}
    for name in names:
        if name not in by_name:
            raise TrainingError(f"--rows {name} is no row of Table 1: choose from {list(by_name)}")
    return [by_name[name] for name in names]
