"""The settings of a run: the authors' defaults, by method and by data set, and their rules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..init import GAIN
from ..models import blocks_per_stage
from .errors import TrainingError

_SHARED = {"noise_on": "unit", "residual_bias": False, "gain": GAIN, "stem": "scaled"}
_CZM = {
    **_SHARED,
    "lr": 0.4,
    "head_lr": 0.1,
    "zmg": 0.85,
    "luma": 5e-4,
    "classifier_luma": 5e-4,
    "weight_decay": 0.0,
    "noise": 0.1,
}
_SGD = {
    **_SHARED,
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
# What a method leaves no choice about: there, the default is the only value.
_FIXED = {
    "czmig": (),
    "czmi": ("zmg",),
    "bn": ("zmg", "luma", "classifier_luma", "head_lr", "residual_bias", "gain", "stem"),
    "plain": ("zmg", "luma", "classifier_luma", "head_lr", "gain", "stem"),
}

_PHOTOGRAPHS = {
    "depth": 110,
    "epochs": 200,
    "batch_size": 128,
    "crop_padding": 4,
    "flip": True,
}
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"depth": 20, "epochs": 40, "batch_size": 50, "crop_padding": 1, "flip": False},
    "imagefolder": _PHOTOGRAPHS,
    "cifar10": _PHOTOGRAPHS,
}

STEMS = ("scaled", "zero-mean", "plain")
SCHEDULES = ("steps", "cosine")
AUTOCAST = ("off", "bfloat16")
LAST_BATCH = ("join", "keep")

_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "crop_padding": 0,
    "hold_out": 0,
    "seed": 0,
    "workers": 0,
}

# Where and how a run computes, not what: these may change when it is resumed.
FREE_ON_RESUME = {
    "epochs",
    "device",
    "backend",
    "cuda_graph",
    "out",
    "data_dir",
    "download",
    "workers",
}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run; each field is the option of `czm-train` of that name.

    Attributes:
        head_lr: learning rate of the biases and the classifier; None means `lr`.
        schedule: `"steps"` at the milestones, or `"cosine"`, half a period over all epochs.
        milestones: the learning rates are multiplied by 0.1 after each of these epochs.
        noise_on: what the noise multiplies: the input of a residual `"unit"`, or that of its
            `"branch"` of convolutions alone.
        gain: the norm of every convolution filter at the start.
        stem: `"scaled"`: as other filters, but with spatial means; `"zero-mean"`: without, too;
            `"plain"`: neither exp-scaled nor anchored.
        hold_out: this many training images, drawn once for all seeds, are tested on instead of the
            test images, and not trained on; 0 for none.
        crop_padding: pixels; images are cropped at random from their zero-padded selves.
        flip: whether images are mirrored left to right at random.
        last_batch: what becomes of an epoch's last batch where it is less than half a batch:
            `"join"` adds it to the one before, `"keep"` leaves it.
        channels_last: whether weights and images have their channels innermost in memory.
        autocast: `"bfloat16"`, what convolutions and the classifier compute in, or `"off"`;
            weights, gradients and the optimizer's state are float32 either way.
        tf32: whether a GPU may round the factors of float32 products to 10 bits.
        compile: whether torch.compile makes the network of full batches, in training.
        cuda_graph: whether the step of full batches is one CUDA graph.
    """

    method: str
    dataset: str
    depth: int
    epochs: int
    schedule: str
    milestones: tuple[int, ...]
    batch_size: int
    lr: float
    head_lr: float | None
    momentum: float
    weight_decay: float
    zmg: float
    luma: float
    classifier_luma: float
    noise: float
    noise_on: str
    residual_bias: bool
    gain: float
    stem: str
    hold_out: int
    crop_padding: int
    flip: bool
    last_batch: str
    seed: int
    channels_last: bool
    autocast: str
    tf32: bool
    compile: bool
    cuda_graph: bool
    device: str
    backend: str
    workers: int
    data_dir: str | None
    download: bool
    out: str

    def __post_init__(self) -> None:
        for name in _FIXED[self.method]:
            only = METHOD_DEFAULTS[self.method][name]
            if getattr(self, name) != only:
                raise TrainingError(
                    f"{option(name)} has no effect on --method {self.method}: leave it out"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise TrainingError(f"{option(name)} must be at least {least}, but was {value}")
        if any(epoch < 1 for epoch in self.milestones) or list(self.milestones) != sorted(
            set(self.milestones)
        ):
            raise TrainingError(
                f"--milestones must be increasing epochs, but were {list(self.milestones)}"
            )
        if self.milestones and self.schedule != "steps":
            raise TrainingError(
                f"--milestones has no effect on --schedule {self.schedule}: leave it out"
            )
        try:
            blocks_per_stage(self.depth)
        except ValueError as error:
            raise TrainingError(f"--depth: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON and checkpoints."""
        return {**asdict(self), "milestones": list(self.milestones)}


def option(name: str) -> str:
    """Return the command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def resolve(given: dict[str, Any]) -> Settings:
    """Complete the settings that were `given` with the method's and the data set's defaults.

    Raises:
        TrainingError: a value is out of range, or has no effect on the method.
    """
    method = given.get("method", "czmig")
    dataset = given.get("dataset", "digits")
    values: dict[str, Any] = {
        "method": method,
        "dataset": dataset,
        "momentum": 0.9,
        "schedule": "steps",
        "hold_out": 0,
        "last_batch": "join",
        "seed": 0,
        "channels_last": False,
        "autocast": "off",
        "tf32": False,
        "compile": False,
        "cuda_graph": False,
        "device": "auto",
        "backend": "auto",
        "workers": 0,
        "data_dir": None,
        "download": False,
        **METHOD_DEFAULTS[method],
        **DATASET_DEFAULTS[dataset],
        **given,
    }
    if "classifier_luma" not in given:
        values["classifier_luma"] = values["luma"]
    steps = values["schedule"] == "steps"
    values.setdefault("milestones", default_milestones(values["epochs"]) if steps else ())
    values["milestones"] = tuple(values["milestones"])
    values.setdefault(
        "out", str(Path("runs", f"{dataset}-{method}-{values['depth']}-s{values['seed']}"))
    )
    return Settings(**values)


def default_milestones(epochs: int) -> tuple[int, ...]:
    """Return half and three quarters of `epochs`, rounded up."""
    return tuple(sorted({math.ceil(epochs / 2), math.ceil(3 * epochs / 4)}))


def resolve_resumed(given: dict[str, Any], saved: dict[str, Any]) -> Settings:
    """Return a checkpoint's settings, with those that were `given` and may change.

    Args:
        given: the settings on the command line.
        saved: the checkpoint's, from `Settings.as_dict`.

    Raises:
        TrainingError: a setting that was given and must not change differs.
    """
    if set(saved) != {field.name for field in fields(Settings)}:
        raise TrainingError("the checkpoint was written by another version of czm-train")
    for name, value in given.items():
        value = list(value) if isinstance(value, tuple) else value
        if name not in FREE_ON_RESUME and value != saved[name]:
            raise TrainingError(
                f"the checkpoint was trained with {option(name)} {saved[name]}, not {value}: "
                "leave the option out, or start without --resume"
            )
    values = {**saved, **given}
    if values["schedule"] == "cosine" and values["epochs"] != saved["epochs"]:
        raise TrainingError(
            f"--schedule cosine was begun for {saved['epochs']} epochs, not {values['epochs']}: "
            "leave --epochs out, or start without --resume"
        )
    return Settings(**{**values, "milestones": tuple(values["milestones"])})
