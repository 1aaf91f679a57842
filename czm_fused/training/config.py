"""The options of a run: the authors' defaults, by method and by data set, and their rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..init import GAIN
from ..models import blocks_per_stage
from .errors import TrainingError, explained

Method: TypeAlias = Literal["czmig", "czmi", "bn", "plain"]
Dataset: TypeAlias = Literal["digits", "imagefolder", "cifar10"]
PlotFormat: TypeAlias = Literal["png", "svg", "pdf"]

_CZM = dict(lr=0.4, head_lr=0.1, zmg=0.85, luma=5e-4, weight_decay=0.0, noise=0.1)
_SGD = dict(lr=0.1, zmg=0.0, luma=0.0, weight_decay=5e-4, noise=0.0)
METHOD_DEFAULTS = {"czmig": _CZM, "czmi": {**_CZM, "zmg": 0.0}, "bn": _SGD, "plain": _SGD}
_SGD_HAS_NO = (
    "zmg", "luma", "classifier_luma", "grad_norm", "center_every", "head_lr", "bias_lr", "gain",
    "stem",
)  # fmt: skip
WITHOUT_EFFECT = {
    "czmig": (),
    "czmi": ("zmg",),
    "bn": (*_SGD_HAS_NO, "residual_bias"),
    "plain": _SGD_HAS_NO,
}
"""Options without effect on a method, which must keep their defaults there."""

_PHOTOGRAPHS = dict(depth=110, epochs=200, batch_size=128, crop_padding=4, flip=True)
DATASET_DEFAULTS = {
    "digits": dict(depth=20, epochs=40, batch_size=50, crop_padding=1, flip=False),
    "imagefolder": _PHOTOGRAPHS,
    "cifar10": _PHOTOGRAPHS,
}
LOCAL = frozenset("device backend cuda_graph out data_dir cache_dir download plot_format".split())
"""Options that decide where and how fast a run computes, not what it trains."""

# Also of the options that studies add.
_LEAST = {"epochs": 1, "batch_size": 1, "seeds": 1, "trials": 1, "heartbeat": 1}
_LEAST |= {"crop_padding": 0, "hold_out": 0, "seed": 0, "center_every": 0}
# Seeds of torch have 64 bits, and each process adds its rank.
_MOST = {"seed": 2**63 - 1}
_DEPENDS: Any = None  # on the method or the data set


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a training run.

    Options that are not given, or None, take the defaults of the method and the data set.
    """

    method: Method = "czmig"
    """czmig: zero-mean initialisation and gradients; czmi: initialisation only; bn: BatchNorm;
    plain: neither."""
    dataset: Dataset = "digits"
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
    crop_padding: int = _DEPENDS
    """Crop at random from images padded with zeros by this many pixels."""
    flip: bool = _DEPENDS
    """Mirror images left to right at random."""
    depth: int = _DEPENDS
    """Layers of the residual network, 6n + 2."""
    residual_bias: bool = False
    """Give the convolutions of the residual units biases, not only stem and classifier."""
    gain: float = GAIN
    """Norm of every convolution filter at the start."""
    stem: Literal["scaled", "zero-mean", "plain"] = "scaled"
    """The filters that read the image. scaled: as all others, but with spatial means; zero-mean: as
    all others; plain: neither exp-scaled nor anchored."""
    epochs: int = _DEPENDS
    """Passes over the training images."""
    batch_size: int = _DEPENDS
    """Images of a step, over all processes."""
    last_batch: Literal["join", "keep"] = "join"
    """An epoch's last batch, where it is less than half of --batch-size: join it to the one before,
    or keep it."""
    lr: float = _DEPENDS
    """Learning rate of the filters."""
    head_lr: float | None = None
    """Learning rate of the classifier and all biases; bn and plain have one rate for all."""
    bias_lr: float | None = None
    """Learning rate of the convolutions' biases (default: --head-lr)."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Of all learning rates: steps at the milestones, or half a cosine over all epochs."""
    milestones: tuple[int, ...] | None = None
    """All rates x0.1 after these epochs (default: half and three quarters of --epochs)."""
    momentum: float = 0.9
    """Momentum of all parameters."""
    weight_decay: float = _DEPENDS
    """L2 weight decay of all parameters."""
    zmg: float = _DEPENDS
    """Share of a gradient's spatial mean to remove, 0 to 1."""
    luma: float = _DEPENDS
    """Strength of L2 unity-magnitude anchoring, which holds filters at unit magnitude."""
    classifier_luma: float | None = None
    """The same for the rows of the classifier (default: --luma)."""
    grad_norm: float = 0.0
    """Norm that the gradient by every filter's direction gets; 0 leaves it as it is."""
    center_every: int = 0
    """Every so many steps, measure the mean of what the convolutions read on the batch at hand, and
    let them read their input relative to it from then on (those with a bias); 0: never."""
    noise: float = _DEPENDS
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
    out: str | None = None
    """Folder of the run (default: runs/<dataset>-<method>-<depth>-s<seed>)."""
    plot_format: PlotFormat = "png"
    """File format of the plots."""

    def __post_init__(self) -> None:
        # Unknown names are for `checked` to refuse.
        for defaults, key in ((METHOD_DEFAULTS, self.method), (DATASET_DEFAULTS, self.dataset)):
            for name, value in defaults.get(key, {}).items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return Path(self.out or f"runs/{self.dataset}-{self.method}-{self.depth}-s{self.seed}")

    @property
    def rate_drops(self) -> tuple[int, ...]:
        """The epochs after which all learning rates are x0.1."""
        if self.milestones is not None or self.schedule != "steps":
            return self.milestones or ()
        return tuple(sorted({math.ceil(self.epochs / 2), math.ceil(3 * self.epochs / 4)}))

    def as_dict(self) -> dict[str, Any]:
        """Return all options as plain values, for JSON and checkpoints."""
        values = {field.name: getattr(self, field.name) for field in fields(Config)}
        anchor = self.luma if self.classifier_luma is None else self.classifier_luma
        derived = dict(milestones=list(self.rate_drops), classifier_luma=anchor)
        return {**values, **derived, "out": str(self.run_folder)}

    def checked(self) -> Config:
        """Return the options with the types that the command line would give them.

        Raises:
            TrainingError: a value has the wrong type, is out of range, or has no effect.
        """
        from .cli import read, to_arguments

        values = {field.name: getattr(self, field.name) for field in fields(Config)}
        default = Config(**known(self.method, self.dataset))
        config: Config = read(Config, to_arguments(values), default=default)
        for name in WITHOUT_EFFECT[config.method]:
            if getattr(config, name) not in (getattr(default, name), default.as_dict()[name]):
                raise TrainingError(
                    f"{option(name)} has no effect on --method {config.method}: leave it out"
                )
        for name, value in {**vars(self), **vars(config)}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise TrainingError(f"{option(name)} must be a finite number, but was {value}")
            if name in _LEAST and value < _LEAST[name]:
                raise TrainingError(
                    f"{option(name)} must be at least {_LEAST[name]}, but was {value}"
                )
            if name in _MOST and value > _MOST[name]:
                raise TrainingError(
                    f"{option(name)} must be at most {_MOST[name]}, but was {value}"
                )
        if config.center_every and config.cuda_graph:
            raise TrainingError("--center-every is no part of a --cuda-graph: leave one out")
        drops = list(config.rate_drops)
        if any(epoch < 1 for epoch in drops) or drops != sorted(set(drops)):
            raise TrainingError(f"--milestones must be increasing epochs, but were {drops}")
        if drops and config.schedule != "steps":
            raise TrainingError("--milestones has no effect on --schedule cosine: leave it out")
        if config.noise_on != default.noise_on and not config.noise:
            raise TrainingError(
                "--noise-on has no effect without noise: leave it out, or give --noise"
            )
        with explained("--depth"):
            blocks_per_stage(config.depth)
        return config


def known(method: Any, dataset: Any) -> dict[str, Any]:
    """Return the method and the data set, as far as they exist."""
    chosen = {"method": method} if method in METHOD_DEFAULTS else {}
    return chosen | ({"dataset": dataset} if dataset in DATASET_DEFAULTS else {})


def option(name: str) -> str:
    """Return the command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def from_saved(saved: Any) -> Config:
    """Return the options that a checkpoint holds."""
    if not isinstance(saved, dict) or set(saved) != {field.name for field in fields(Config)}:
        raise TrainingError("the run was written by another version of czm-train: start a new one")
    return Config(**saved).checked()


def difference(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Collection[str]
) -> str | None:
    """Return the first option that two runs set differently, as in `--epochs 1, not 2`."""
    for name in wanted:
        if name not in ignored and saved.get(name) != wanted[name]:
            return f"{option(name)} {saved.get(name)}, not {wanted[name]}"
    return None


def check_resumed(config: Config, saved: Config) -> None:
    """Raise TrainingError where a resumed run changes an option that decides what it trains."""
    may_change = LOCAL | ({"epochs"} if saved.schedule == "steps" else set())
    found = difference(saved.as_dict(), config.as_dict(), may_change)
    if found:
        raise TrainingError(
            f"the checkpoint was trained with {found}: leave the option out, or start without "
            "--resume"
        )
