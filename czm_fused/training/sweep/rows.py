"""The rows of the paper's Table 1: their options, and the paper's measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..cli import parse_options
from ..config import FREE_ON_RESUME, Config, ResolvedConfig, defaults_of, option
from ..errors import TrainingError

ROW_OPTIONS = ("method", "lr", "zmg", "noise")

# Options that may differ between the workers of a study.
LOCAL = FREE_ON_RESUME - {"epochs"}

_BATCHNORM_ONLY = ("weight_decay",)
_CZM_ONLY = ("head_lr", "luma", "classifier_luma", "residual_bias", "gain", "stem")


@dataclass(frozen=True)
class Row:
    """A row of Table 1.

    Attributes:
        mean: the mean of the 8 test accuracies in the paper, %.
        sd: their standard deviation.
    """

    method: str
    lr: float
    zmg: float
    noise: float
    mean: float
    sd: float

    @property
    def name(self) -> str:
        """The name for `--rows` and folders, as in `czmig-lr0.4-zmg0.85-noise0.1`."""
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

    def config(self, arguments: Sequence[str]) -> ResolvedConfig:
        """Return the config of the row's runs; options that its method lacks are left out.

        Args:
            arguments: options of `czm-train` for all rows.

        Raises:
            TrainingError: a value is out of range, or a study sets the option itself.
        """
        own = {name: getattr(self, name) for name in ROW_OPTIONS}
        base = Config(**{**defaults_of(self.method, "cifar10"), **own})
        given = parse_options(arguments, base)
        if given.dataset != base.dataset:
            of_dataset = defaults_of(self.method, given.dataset)
            changed = {n: v for n, v in of_dataset.items() if n not in own and n != "depth"}
            given = parse_options(arguments, replace(base, **changed))
        for name in (*ROW_OPTIONS, "seed", "out"):
            if getattr(given, name) != getattr(base, name):
                raise TrainingError(
                    f"{option(name)} is set by the study for each run: leave it out "
                    "(--rows and --seeds choose the runs, --folder their place)"
                )
        foreign = _CZM_ONLY if self.method == "bn" else _BATCHNORM_ONLY
        return replace(given, **{name: getattr(base, name) for name in foreign}).resolve()

    def trained(self, config: dict[str, Any]) -> bool:
        """Return whether a run with these options is one of the row."""
        return all(config.get(name) == getattr(self, name) for name in ROW_OPTIONS)


BATCHNORM = Row("bn", 0.1, 0.0, 0.0, 93.70, 0.55)

# In the paper's order. It contradicts itself on the last row's method; a zmg of 1 has a meaning for
# CZMIG alone.
TABLE1 = (
    Row("czmig", 0.4, 0.85, 0.1, 94.03, 0.14),
    BATCHNORM,
    Row("czmig", 0.4, 0.98, 0.1, 93.64, 0.11),
    Row("czmig", 0.4, 0.85, 0.0, 93.57, 0.12),
    Row("czmig", 0.2, 0.85, 0.0, 93.44, 0.18),
    Row("czmi", 0.4, 0.0, 0.1, 93.33, 0.11),
    Row("czmi", 0.1, 0.0, 0.0, 93.06, 0.22),
    Row("czmi", 0.2, 0.0, 0.0, 92.95, 0.23),
    Row("czmi", 0.4, 0.0, 0.0, 92.13, 0.26),
    Row("czmig", 0.1, 0.85, 0.0, 92.95, 0.20),
    Row("czmig", 0.1, 1.0, 0.1, 91.03, 0.25),
)


def shared(config: ResolvedConfig) -> dict[str, Any]:
    """Return the options that do not depend on the seed and the machine."""
    values = config.as_dict()
    return {name: values[name] for name in values if name not in LOCAL and name != "seed"}


def find(names: Sequence[str]) -> list[Row]:
    """Return the rows called `names`, in that order.

    Raises:
        TrainingError: there is no such row.
    """
    by_name = {row.name: row for row in TABLE1}
    for name in names:
        if name not in by_name:
            raise TrainingError(
                f"--rows {name} is no row of Table 1: choose from {', '.join(by_name)}"
            )
    return [by_name[name] for name in names]
