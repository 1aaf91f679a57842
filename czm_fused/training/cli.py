"""The command line of `czm-train`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ops.backends import BACKENDS
from . import checkpoint
from .errors import TrainingError
from .settings import (
    AUTOCAST,
    DATASET_DEFAULTS,
    METHOD_DEFAULTS,
    Settings,
    resolve,
    resolve_resumed,
)


@dataclass(frozen=True)
class Invocation:
    """What the command line asked for.

    Attributes:
        settings: of the run, complete.
        resumed: the checkpoint to go on from, or None.
    """

    settings: Settings
    resumed: dict[str, Any] | None


def parse(arguments: Sequence[str] | None = None) -> Invocation:
    """Read the command line, and the checkpoint's settings where it resumes one.

    Raises:
        TrainingError: a value is out of range, does not fit the checkpoint, or would replace a run
            that nobody asked to delete.
        SystemExit: argparse's, after printing help (status 0) or an error (status 2).
    """
    given = vars(_parser().parse_args(arguments))
    overwrite = given.pop("overwrite", False)
    if "resume" in given:
        place = Path(given.pop("resume") or resolve(given).out)
        source = place if place.is_dir() else place.parent
        resumed = checkpoint.load(place)
        settings = resolve_resumed({"out": str(source), **given}, resumed["settings"])
    else:
        source = None
        resumed = None
        settings = resolve(given)
    out = Path(settings.out)
    goes_on_in_place = source is not None and out.resolve() == source.resolve()
    if (out / checkpoint.FILE_NAME).exists() and not goes_on_in_place and not overwrite:
        raise TrainingError(
            f"--out {out} holds a run: continue it with --resume {out}, "
            "replace it with --overwrite, or choose another folder"
        )
    return Invocation(settings, resumed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="czm-train",
        usage="czm-train [options]",
        description="Train a CIFAR residual network without BatchNorm (arXiv 1911.13173), or with.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_what_to_train(parser.add_argument_group("what to train"))
    _add_optimization(parser.add_argument_group("optimization"))
    _add_where_to_run(parser.add_argument_group("where to run"))
    return parser


def _add_what_to_train(group: Any) -> None:
    group.add_argument(
        "--method",
        choices=METHOD_DEFAULTS,
        help="czmig: zero-mean initialisation and gradients; czmi: initialisation only; "
        "bn: BatchNorm; plain: neither (default: czmig)",
    )
    group.add_argument("--depth", type=int, metavar="6n+2", help=_by_dataset("depth"))
    group.add_argument(
        "--residual-bias",
        action="store_true",
        help="give the residual units' convolutions biases (default: only stem and classifier)",
    )
    group.add_argument(
        "--dataset",
        choices=DATASET_DEFAULTS,
        help="digits: scikit-learn's, bundled; imagefolder: train/ and test/ under --data-dir, a "
        "folder a class; cifar10: torchvision's (default: digits)",
    )
    group.add_argument("--data-dir", metavar="DIR", help="where the images are")
    group.add_argument(
        "--download", action="store_true", help="let --dataset cifar10 fetch what is missing"
    )
    group.add_argument(
        "--crop-padding",
        type=int,
        metavar="PIXELS",
        help="crop at random from images padded by this; " + _by_dataset("crop_padding"),
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror images at random; " + _by_dataset("flip"),
    )


def _add_optimization(group: Any) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help=_by_dataset("epochs"))
    group.add_argument("--batch-size", type=int, metavar="N", help=_by_dataset("batch_size"))
    group.add_argument(
        "--lr", type=_number, metavar="X", help="filters' learning rate; " + _by_method("lr")
    )
    group.add_argument(
        "--head-lr",
        type=_number,
        metavar="X",
        help="learning rate of the classifier and all biases; default: 0.1 for czmig and czmi; "
        "bn and plain have one rate for all",
    )
    group.add_argument(
        "--milestones",
        type=int,
        nargs="*",
        metavar="EPOCH",
        help="all rates x0.1 after these epochs (default: half and three quarters of --epochs)",
    )
    group.add_argument("--momentum", type=_number, metavar="X", help="default: 0.9")
    group.add_argument("--weight-decay", type=_number, metavar="X", help=_by_method("weight_decay"))
    group.add_argument(
        "--zmg",
        type=_number,
        metavar="X",
        help="share of a gradient's spatial mean to remove, 0 to 1; " + _by_method("zmg"),
    )
    group.add_argument(
        "--luma",
        type=_number,
        metavar="X",
        help="strength of the anchor that holds filters at unit magnitude; " + _by_method("luma"),
    )
    group.add_argument(
        "--classifier-luma",
        type=_number,
        metavar="X",
        help="the same for the classifier's rows (default: that of --luma)",
    )
    group.add_argument(
        "--noise",
        type=_number,
        metavar="A",
        help="residual units' inputs are multiplied by U(1-A, 1+A); " + _by_method("noise"),
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")


def _add_where_to_run(group: Any) -> None:
    group.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, ... (default: auto, the accelerator if there is one)",
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="keep channels innermost in memory, as convolutions prefer (default: no)",
    )
    group.add_argument(
        "--autocast",
        choices=AUTOCAST,
        help="compute convolutions in bfloat16; weights stay float32 (default: off)",
    )
    group.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        help="of the optimizer step (default: auto, the fastest here)",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that decode images (default: 0, as many as processors)",
    )
    group.add_argument(
        "--out", metavar="DIR", help="default: runs/<dataset>-<method>-<depth>-s<seed>"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const=None,
        metavar="CHECKPOINT",
        help="go on from a checkpoint or a run's folder (default: --out); its settings apply, "
        "--epochs and the options of this group may change",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the run that --out holds, if any"
    )


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_number.__name__ = "finite number"  # argparse's errors name the type


def _by_method(name: str) -> str:
    return _default_of(name, METHOD_DEFAULTS)


def _by_dataset(name: str) -> str:
    return _default_of(name, DATASET_DEFAULTS)


def _default_of(name: str, table: dict[str, dict[str, Any]]) -> str:
    owners: dict[Any, list[str]] = {}
    for owner, defaults in table.items():
        owners.setdefault(defaults[name], []).append(owner)
    parts = [f"{value} for {' and '.join(who)}" for value, who in owners.items()]
    return "default: " + ", ".join(parts)
