"""The options of a run: the authors' defaults, by method and by data set, and their rules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..init import GAIN
from ..models import blocks_per_stage
from .errors import TrainingError

_CZM = {
    "lr": 0.4,
    "head_lr": 0.1,
    "zmg": 0.85,
    "luma": 5e-4,
    "classifier_luma": 5e-4,
    "weight_decay": 0.0,
    "noise": 0.1,
}
_SGD = {
    "lr": 0.1,
    "head_lr": None,
    "zmg": 0.0,
    "luma": 0.0,
    "classifier_luma": 0.0,
    "weight_decay": 5e-4,
    "noise": 0.0,
}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "czmig": _CZM,
    "czmi": {**_CZM, "zmg": 0.0},
    "bn": _SGD,
    "plain": _SGD,
}
_SGD_HAS_NO = ("zmg", "luma", "classifier_luma", "head_lr", "gain", "stem")
# Options without effect on a method; they must keep their defaults there.
WITHOUT_EFFECT = {
    "czmig": (),
    "czmi": ("zmg",),
    "bn": (*_SGD_HAS_NO, "residual_bias"),
    "plain": _SGD_HAS_NO,
}

_PHOTOGRAPHS = {"depth": 110, "epochs": 200, "batch_size": 128, "crop_padding": 4, "flip": True}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"depth": 20, "epochs": 40, "batch_size": 50, "crop_padding": 1, "flip": False},
    "imagefolder": _PHOTOGRAPHS,
    "cifar10": _PHOTOGRAPHS,
}

_LEAST = {"epochs": 1, "batch_size": 1, "crop_padding": 0, "hold_out": 0, "seed": 0, "workers": 0}

# Options that decide where and how fast a run computes, not what; a resumed run may change them.
FREE_ON_RESUME = frozenset(
    "epochs device backend cuda_graph out data_dir cache_dir download workers plot_format".split()
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a training run. None stands for the default of the method or data set."""

    method: Literal["czmig", "czmi", "bn", "plain"] = "czmig"
    """czmig: zero-mean initialisation and gradients; czmi: initialisation only; bn: BatchNorm;
    plain: neither."""
    dataset: Literal["digits", "imagefolder", "cifar10"] = "digits"
    """digits: scikit-learn's, bundled; imagefolder: train/ and test/ (or val/) under --data-dir, a
    folder a class; cifar10: torchvision's."""
    data_dir: str | None = None
    """Folder of the images."""
    download: bool = False
    """Let --dataset cifar10 fetch what is missing."""
    cache_dir: str | None = None
    """Folder for the decoded images of an image folder (default: czm-fused in $XDG_CACHE_HOME or
    ~/.cache)."""
    hold_out: int = 0
    """Test on this many of the training images, the same for all seeds, and train on the others; 0
    tests on the test images."""
    crop_padding: int | None = None
    """Crop at random from images padded with zeros by this many pixels."""
    flip: bool | None = None
    """Mirror images left to right at random."""
    depth: int | None = None
    """Layers of the residual network, 6n + 2."""
    residual_bias: bool = False
    """Give the convolutions of the residual units biases, not only stem and classifier."""
    gain: float = GAIN
    """Norm of every convolution filter at the start."""
    stem: Literal["scaled", "zero-mean", "plain"] = "scaled"
    """The filters that read the image. scaled: as all others, but with spatial means; zero-mean: as
    all others; plain: neither exp-scaled nor anchored."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images of a step, over all processes."""
    last_batch: Literal["join", "keep"] = "join"
    """An epoch's last batch, where it is less than half of --batch-size: join it to the one before,
    or keep it."""
    lr: float | None = None
    """Learning rate of the filters."""
    head_lr: float | None = None
    """Learning rate of the classifier and all biases; bn and plain have one rate for all."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Of all learning rates: steps at the milestones, or half a cosine over all epochs."""
    milestones: tuple[int, ...] | None = None
    """All rates x0.1 after these epochs (default: half and three quarters of --epochs)."""
    momentum: float = 0.9
    """Momentum of all parameters."""
    weight_decay: float | None = None
    """L2 weight decay of all parameters."""
    zmg: float | None = None
    """Share of a gradient's spatial mean to remove, 0 to 1."""
    luma: float | None = None
    """Strength of L2 unity-magnitude anchoring, which holds filters at unit magnitude."""
    classifier_luma: float | None = None
    """The same for the rows of the classifier (default: --luma)."""
    noise: float | None = None
    """Multiply the inputs of the residual units by U(1 - noise, 1 + noise)."""
    noise_on: Literal["unit", "branch"] = "unit"
    """Apply the noise to the whole input of a unit, or to that of its convolutions alone."""
    seed: int = 0
    """Seed of all random draws."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    backend: Literal["auto", "cpu", "cuda", "triton", "reference"] = "auto"
    """Of the optimizer step: auto takes the fastest here."""
    channels_last: bool = False
    """Keep channels innermost in memory, as convolutions prefer."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Compute convolutions in bfloat16; weights stay float32."""
    tf32: bool = False
    """Let GPUs round the factors of float32 products to TF32's 10 bits."""
    compile: bool = False
    """Run full batches through torch.compile, in training."""
    cuda_graph: bool = False
    """Make the step of a full batch one CUDA graph, from augmentation to optimizer."""
    workers: int = 0
    """Threads that decode images; 0 takes as many as there are processors."""
    out: str | None = None
    """Folder of the run (default: runs/<dataset>-<method>-<depth>-s<seed>)."""
    plot_format: Literal["png", "svg", "pdf"] = "png"
    """File format of the plots."""

    def resolve(self) -> ResolvedConfig:
        """Return a copy with every None that has a default replaced, checked.

        Raises:
            TrainingError: a value has the wrong type, is out of range, or has no effect.
        """
        check_types(self)
        given = {name: value for name, value in asdict(self).items() if value is not None}
        values = {**METHOD_DEFAULTS[self.method], **DATASET_DEFAULTS[self.dataset], **given}
        values.setdefault("classifier_luma", None)
        if self.classifier_luma is None:
            values["classifier_luma"] = values["luma"]
        if self.milestones is None:
            values["milestones"] = (
                default_milestones(values["epochs"]) if self.schedule == "steps" else ()
            )
        if self.out is None:
            name = f"{self.dataset}-{self.method}-{values['depth']}-s{self.seed}"
            values["out"] = str(Path("runs", name))
        config = ResolvedConfig(**values)
        _check_ranges(config)
        return config

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values, for JSON and checkpoints."""
        values = asdict(self)
        if self.milestones is not None:
            values["milestones"] = list(self.milestones)
        return values


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """The options of a run, complete; `Config.resolve` makes it."""

    depth: int
    epochs: int
    batch_size: int
    crop_padding: int
    flip: bool
    lr: float
    weight_decay: float
    zmg: float
    luma: float
    classifier_luma: float
    noise: float
    milestones: tuple[int, ...]
    out: str


def option(name: str) -> str:
    """Return the command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def defaults_of(method: str, dataset: str) -> dict[str, Any]:
    """Return the options whose defaults depend on the method and the data set, with those."""
    values = {**METHOD_DEFAULTS[method], **DATASET_DEFAULTS[dataset]}
    del values["classifier_luma"]  # follows --luma
    return {"method": method, "dataset": dataset, **values}


def default_milestones(epochs: int) -> tuple[int, ...]:
    """Return half and three quarters of `epochs`, rounded up."""
    return tuple(sorted({math.ceil(epochs / 2), math.ceil(3 * epochs / 4)}))


def check_types(config: Any) -> None:
    """Check the value of every option against its type.

    Raises:
        TrainingError: one does not fit; the message names the option.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        if not any(_fits(value, each) for each in _alternatives(hint)):
            wanted = " or ".join(_describe(each) for each in _alternatives(hint))
            raise TrainingError(f"{option(field.name)} must be {wanted}, but was {value!r}")


def from_saved(saved: Any) -> ResolvedConfig:
    """Return the options that a checkpoint or another file holds.

    Raises:
        TrainingError: they are of another version, or damaged.
    """
    names = {field.name for field in fields(Config)}
    if not isinstance(saved, dict) or set(saved) != names:
        raise TrainingError("the run was written by another version of czm-train: start a new one")
    if isinstance(saved["milestones"], list):
        saved = {**saved, "milestones": tuple(saved["milestones"])}
    return Config(**saved).resolve()


def check_resumed(config: ResolvedConfig, saved: ResolvedConfig) -> None:
    """Check that a resumed run changes no option that decides what it trains.

    Raises:
        TrainingError: it does; the message names the option.
    """
    for name, value in asdict(config).items():
        before = getattr(saved, name)
        if name not in FREE_ON_RESUME and value != before:
            raise TrainingError(
                f"the checkpoint was trained with {option(name)} {before}, not {value}: "
                "leave the option out, or start without --resume"
            )
    if config.schedule == "cosine" and config.epochs != saved.epochs:
        raise TrainingError(
            f"--schedule cosine was begun for {saved.epochs} epochs, not {config.epochs}: "
            "leave --epochs out, or start without --resume"
        )


def with_values(config: Config, values: dict[str, Any], source: str) -> Config:
    """Return `config` with the `values` that a file, called `source`, gives.

    Raises:
        TrainingError: it names an option that does not exist.
    """
    known = {field.name for field in fields(Config)}
    for name in values:
        if name not in known:
            raise TrainingError(
                f"{source} must set options of czm-train, but set {name!r}: "
                "see czm-train --help, and write - as _"
            )
    if isinstance(values.get("milestones"), list):
        values = {**values, "milestones": tuple(values["milestones"])}
    return replace(config, **values)


def _check_ranges(config: ResolvedConfig) -> None:
    declared = {field.name: field.default for field in fields(Config)}
    for name in WITHOUT_EFFECT[config.method]:
        only = METHOD_DEFAULTS[config.method].get(name, declared[name])
        if getattr(config, name) != only:
            raise TrainingError(
                f"{option(name)} has no effect on --method {config.method}: leave it out"
            )
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value < least:
            raise TrainingError(f"{option(name)} must be at least {least}, but was {value}")
    milestones = list(config.milestones)
    if any(epoch < 1 for epoch in milestones) or milestones != sorted(set(milestones)):
        raise TrainingError(f"--milestones must be increasing epochs, but were {milestones}")
    if milestones and config.schedule != "steps":
        raise TrainingError(
            f"--milestones has no effect on --schedule {config.schedule}: leave it out"
        )
    try:
        blocks_per_stage(config.depth)
    except ValueError as error:
        raise TrainingError(f"--depth: {error}") from error


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, int) for each in value)
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    names = {float: "a finite number", int: "an integer", str: "text", NoneType: "nothing"}
    return names.get(hint, "a list of integers" if get_origin(hint) is tuple else "true or false")
