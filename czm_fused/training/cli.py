"""The command line of `czm-train`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import NOISE_ON
from ..ops.backends import BACKENDS
from . import checkpoint
from .errors import TrainingError
from .settings import (
    AUTOCAST,
    DATASET_DEFAULTS,
    LAST_BATCH,
    METHOD_DEFAULTS,
    SCHEDULES,
    STEMS,
    Settings,
    resolve,
    resolve_resumed,
)

Checkpoint = dict[str, Any]


@dataclass(frozen=True)
class Invocation:
    """What the command line asked for.

    Attributes:
        runs: to train together: the settings of each, complete, and the checkpoint to go on from,
            or None.
        to_resume: the options of `czm-train` that go on with them.
    """

    runs: list[tuple[Settings, Checkpoint | None]]
    to_resume: str


def parse(arguments: Sequence[str] | None = None) -> Invocation:
    """Read the command line, and the checkpoint's settings where it resumes one.

    Raises:
        TrainingError: a value is out of range, does not fit the checkpoint, or would replace a run
            that nobody asked to delete.
        SystemExit: argparse's, after printing help (status 0) or an error (status 2).
    """
    parser = make_parser()
    parser.add_argument(
        "--parallel-seeds",
        type=int,
        metavar="K",
        default=1,
        help="train K seeds from --seed on together on one device, on a GPU each in a stream of "
        "its own; each ends as it would alone, in a folder of its own: s<seed> in --out, which is "
        "then runs/<dataset>-<method>-<depth> (default: 1). Resumes with the same K",
    )
    given = vars(parser.parse_args(arguments))
    count = given.pop("parallel_seeds")
    overwrite = given.pop("overwrite", False)
    if count < 1:
        raise TrainingError(f"--parallel-seeds must be at least 1, but was {count}")
    if count > 1:
        return _several(given, count, overwrite)
    if "resume" not in given:
        return _of_one(resolve(given), None, overwrite)
    place = Path(given.pop("resume") or resolve(given).out)
    source = place if place.is_dir() else place.parent
    resumed = checkpoint.load(place)
    settings = resolve_resumed({"out": str(source), **given}, resumed["settings"])
    goes_on_in_place = Path(settings.out).resolve() == source.resolve()
    return _of_one(settings, resumed, overwrite or goes_on_in_place)


def _of_one(settings: Settings, resumed: Checkpoint | None, may_replace: bool) -> Invocation:
    _check_free(settings, may_replace)
    return Invocation([(settings, resumed)], f"--resume {settings.out}")


def _several(given: dict[str, Any], count: int, overwrite: bool) -> Invocation:
    """Return the runs of `count` seeds, those of them resumed that have a checkpoint."""
    resumes = "resume" in given
    if given.get("resume") and "out" in given:
        raise TrainingError(
            "--parallel-seeds goes on where it finds the runs: give --resume their folder, and no "
            "--out"
        )
    first = given.get("seed", 0)
    parent = given.pop("resume", None) or given.get("out")
    if parent is None:
        parent = resolve(given).out.removesuffix(f"-s{first}")
    each_given = [
        {**given, "seed": seed, "out": str(Path(parent, f"s{seed}"))}
        for seed in range(first, first + count)
    ]
    places = [Path(resolve(each).out) for each in each_given]
    found = [
        checkpoint.load(place) if resumes and (place / checkpoint.FILE_NAME).exists() else None
        for place in places
    ]
    if resumes and not any(found):
        raise TrainingError(f"no checkpoint in {places[0]} or its like: start without --resume")
    runs = []
    for each, place, resumed in zip(each_given, places, found, strict=True):
        # Killed early, some runs have not begun: their settings are those of the others.
        known = resumed or next(filter(None, found), None)
        if known is None:
            settings = resolve(each)
        else:
            seed, out = each["seed"], str(place)
            saved = {**known["settings"], "seed": seed, "out": out}
            settings = resolve_resumed({**each, "out": out}, saved)
        _check_free(settings, overwrite or resumed is not None)
        runs.append((settings, resumed))
    return Invocation(runs, f"--resume {parent} --seed {first} --parallel-seeds {count}")


def _check_free(settings: Settings, may_replace: bool) -> None:
    out = settings.out
    if (Path(out) / checkpoint.FILE_NAME).exists() and not may_replace:
        raise TrainingError(
            f"--out {out} holds a run: continue it with --resume {out}, "
            "replace it with --overwrite, or choose another folder"
        )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of a run's options; its namespace holds only those that were given."""
    parser = argparse.ArgumentParser(
        prog="czm-train",
        usage="czm-train [options]\n"
        "       czm-train table1 --help (the paper's Table 1)\n"
        "       czm-train figures --help (its figures)",
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
        "--gain",
        type=_number,
        metavar="X",
        help="norm of every convolution filter at the start (default: 0.8)",
    )
    group.add_argument(
        "--stem",
        choices=STEMS,
        help="the filters that read the image. scaled: as all others, but with spatial means; "
        "zero-mean: as all others; plain: neither exp-scaled nor anchored (default: scaled)",
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
        "--hold-out",
        type=int,
        metavar="N",
        help="test on N of the training images, the same for all seeds, and train on the others "
        "(default: 0, test on the test images)",
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
        "--schedule",
        choices=SCHEDULES,
        help="of all rates: steps at the milestones, or half a cosine over all epochs (default: "
        "steps)",
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
    group.add_argument(
        "--noise-on",
        choices=NOISE_ON,
        help="what the noise multiplies: the whole input of a unit, or that of its convolutions "
        "alone, not the shortcut's (default: unit)",
    )
    group.add_argument(
        "--last-batch",
        choices=LAST_BATCH,
        help="an epoch's last batch, where it is less than half of --batch-size: join it to the "
        "one before, or keep it, however few its images (default: join)",
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
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="let GPUs round the factors of float32 products to TF32's 10 bits (default: no)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run full batches through torch.compile, in training (default: no)",
    )
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="make the step of a full batch one CUDA graph, from augmentation to optimizer "
        "(default: no)",
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
        help="go on from a checkpoint or a run's folder (default: --out); its settings apply; "
        "--epochs (of steps), --device (of the same kind), --backend, --cuda-graph, --workers, "
        "--data-dir, --download and --out may change",
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
