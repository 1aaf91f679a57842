"""Measure the filters of a network in training, its signals, and how far it rejects mean shift."""

# torch is typed in part.
# mypy: no-warn-return-any

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from czm_fused._internal.sharding import reshard
from czm_fused._internal.signals import Signals, output_spread
from czm_fused._internal.text import Tabular, shorten
from czm_fused.calibration import DEAD, EXPLODED
from czm_fused.example import hooked, preserved, run_example
from czm_fused.init import Convolution, named_convolutions
from czm_fused.nn import ExpScale
from czm_fused.ops.step.reference import filter_norms
from czm_fused.optim import FusedCZMSGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log: TypeAlias = Callable[[dict[str, float], int], object]
"""A function of quantities by name and the number of steps taken."""


@dataclass(frozen=True)
class Spread:
    """The median and the range of a quantity over the filters of a layer."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class LayerDiagnostics:
    """The state of one convolution, W[f] = exp(g[f]) V[f]; None stands for an unknown quantity.

    Attributes:
        name: its dotted name.
        depth: its place in the order of execution, from 0, which networks that name their layers
            differently have in common; layers that did not run come last.
        filters: how many it has.
        gain: ‖W[f]‖, the norm of a filter, which `czm_init_` and `calibrate_` set.
        output_spread: standard deviation of its output over samples and positions, the root mean
            square over channels, in eval mode; None if the layer did not run.
        direction_norm: ‖V[f]‖, which LUMA holds near 1 (paper section 3.4).
        scale: exp(g[f]) (section 3.1). Before the first step of `FusedCZMSGD`, the scale that this
            step starts with, ‖W[f]‖.
        isocline_distance: the share of a filter that is spatial mean, ‖M[f]‖ / ‖W[f]‖ with
            M[f, c, t] = mean over t of W[f, c, t], from 0, on the isocline (section 3.3), to 1,
            which filters of one tap cannot help. 0 for a filter of zeros.
        shift_gain: what becomes of a constant shift of the input, drawn for each channel
            independently: root mean square of the output's shift, away from padded borders, over
            that of the input's, sqrt(mean_f sum_c (sum_t W[f, c, t])²).
        signal_gain: root mean square of the output, without bias, over that of the input, when the
            input is the batch's own minus the mean of every image's channels; None if the layer did
            not run, or its input varies nowhere.
        effective_lr: lr / ‖V[f]‖², the rate at which a direction turns, in a network that does not
            depend on its norm (van Laarhoven, arXiv 1706.05350, section 3); None if no optimizer
            trains the layer.
    """

    name: str
    depth: int
    filters: int
    gain: Spread
    output_spread: float | None
    direction_norm: Spread
    scale: Spread
    isocline_distance: Spread
    shift_gain: float
    signal_gain: float | None
    effective_lr: Spread | None

    @property
    def rejection_db(self) -> float | None:
        """The common-mode rejection ratio, 20 log10(signal_gain / shift_gain), in decibels."""
        if self.signal_gain is None:
            return None
        signal_gain = torch.tensor(self.signal_gain, dtype=torch.float64, device="cpu")
        return 20 * (signal_gain / self.shift_gain).log10().item()


SPREADS = ("gain", "direction_norm", "scale", "isocline_distance", "effective_lr")
NUMBERS = ("output_spread", "shift_gain", "signal_gain", "rejection_db")
"""The quantities of a layer, which are the fields and properties of `LayerDiagnostics`."""

_COLUMNS = {
    "gain": "gain",
    "output_spread": "output spread",
    "direction_norm": "‖V‖",
    "scale": "exp(g)",
    "isocline_distance": "off isocline",
    "rejection_db": "rejection",
    "effective_lr": "effective lr",
}
_PANELS = {
    "output_spread": "output spread",
    "direction_norm": "direction norm ‖V‖",
    "scale": "scale exp(g)",
    "isocline_distance": "distance from the isocline",
    "rejection_db": "common-mode rejection, dB",
    "effective_lr": "effective learning rate",
}
_LOGARITHMIC = ("output_spread", "effective_lr")


@dataclass(frozen=True)
class Report(Tabular):
    """The state of every convolution of a network; printed, a table of medians and ranges.

    Attributes:
        layers: the convolutions, in the order of execution, then those that did not run.
        output_spread: the spread of the model's first output, such as the logits; None if it is not
            a floating-point tensor.
        notes: in words, what is dead or explodes, and the remedy.
    """

    layers: tuple[LayerDiagnostics, ...]
    output_spread: float | None = None
    notes: tuple[str, ...] = ()

    _right_aligned = range(1, len(_COLUMNS) + 2)

    def as_dict(self) -> dict[str, float]:
        """Return what is known as numbers by name, for loggers.

        The names are `layer/quantity`, and `output_spread` for the model's. A quantity that varies
        over the filters is given as its median, beside `layer/quantity_min` and
        `layer/quantity_max`.
        """
        numbers: dict[str, float] = {}
        for layer in self.layers:
            for quantity in SPREADS:
                spread: Spread | None = getattr(layer, quantity)
                if spread is not None:
                    key = f"{layer.name}/{quantity}"
                    numbers[key] = spread.median
                    numbers[f"{key}_min"], numbers[f"{key}_max"] = spread.min, spread.max
            for quantity in NUMBERS:
                number: float | None = getattr(layer, quantity)
                if number is not None:
                    numbers[f"{layer.name}/{quantity}"] = number
        if self.output_spread is not None:
            numbers["output_spread"] = self.output_spread
        return numbers

    def plot(self) -> Figure:
        """Draw each quantity that is known over the depth: medians with the ranges of the filters.

        The layer at one depth is drawn at one place, whatever its name.

            >>> report = diagnose(nn.Conv2d(3, 8, 3), torch.randn(4, 3, 8, 8))
            >>> report.plot().savefig("layers.svg")  # doctest: +SKIP

        Returns:
            A matplotlib figure; `savefig` writes PNG, SVG or PDF, by the suffix of the file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'czm-fused[train]'") from error
        from czm_fused._internal.layer_plot import plot_layers

        panels = {}
        for quantity, label in _PANELS.items():
            values = {layer.depth: getattr(layer, quantity) for layer in self.layers}
            panels[label] = {depth: value for depth, value in values.items() if _is_finite(value)}
        logarithmic = [_PANELS[quantity] for quantity in _LOGARITHMIC]
        return plot_layers([layer.name for layer in self.layers], panels, logarithmic)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "filters", *_COLUMNS.values())]
        for layer in self.layers:
            cells = (_format(quantity, getattr(layer, quantity)) for quantity in _COLUMNS)
            rows.append((layer.name, str(layer.filters), *cells))
        spread = _format("output_spread", self.output_spread)
        rows.append(("(output of the model)", "", "", spread, *[""] * (len(_COLUMNS) - 2)))
        return rows


def diagnose(model: nn.Module, images: Any, optimizer: Optimizer | None = None) -> Report:
    """Measure every convolution of `model` on a batch, and leave everything as it was.

    One forward pass, in eval mode and without gradients. Modes, buffers and torch's generators are
    restored. Works for any network, with BatchNorm as well; a wrapper of DDP or `torch.compile` is
    looked through. Transposed convolutions are not measured.

        >>> report = diagnose(nn.Conv2d(3, 8, 3), torch.randn(4, 3, 8, 8))
        >>> report.layers[0].filters
        8

    Args:
        model: the network.
        images: the batch: a tensor, a tuple of positional or a dictionary of keyword arguments.
        optimizer: the optimizer of the model, or a wrapper of it (Accelerate's, Lightning's).
            `FusedCZMSGD` knows the log-scales g, as the parameters of `exp_scale(conv)` do;
            without, V is W itself and the scale 1. It also gives the learning rates.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.
        ValueError: the model has no convolution, none runs on `images`, a lazy one has no weight
            yet, `optimizer` trains none of the model's parameters, or the model is scripted, traced
            or exported.

    Warns:
        UserWarning: the output of a layer or of the model is constant, not finite, or, in a network
            without normalisation, has a spread below 1e-3 or above 1e3; with names and remedy.
    """
    model = _unwrapped(model)
    convolutions = named_convolutions(model)
    if not convolutions:
        raise ValueError("model must have a convolution, but has none")
    reshard(model)
    optimizer = _innermost(optimizer)
    groups = _groups_of(model, optimizer)
    signals: dict[str, Signals] = {}  # in the order of execution

    def enter(convolution: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signals.setdefault(names[convolution], Signals()).enter(convolution, args, kwargs)

    def leave(convolution: Any, args: Any, output: Tensor) -> None:
        signals[names[convolution]].leave(convolution, args, output)

    names = {convolution: name for name, convolution in convolutions.items()}
    hooks: list[RemovableHandle] = []
    for convolution in names:
        hooks.append(convolution.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(convolution.register_forward_hook(leave))
    try:
        with hooked(hooks), preserved(model), _uncompiled():
            output = run_example(model.eval(), images)
    finally:
        reshard(model)
    if not signals:
        raise ValueError("images must reach a convolution of the model, but none ran on them")
    for name in convolutions:
        signals.setdefault(name, Signals())
    with torch.no_grad():
        layers = tuple(
            _measure(name, depth, convolutions[name], signal, groups, optimizer)
            for depth, (name, signal) in enumerate(signals.items())
        )
    spread = output_spread(output)
    notes = tuple(_complaints(model, layers, spread))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Report(layers, spread, notes)


def watch(
    model: nn.Module, optimizer: Optimizer, images: Any, *, log: Log, every: int = 100
) -> RemovableHandle:
    """Log the diagnostics of `model` after every `every` steps of `optimizer`, on one batch.

    Args:
        model: the network.
        optimizer: its optimizer, or a wrapper of it (Accelerate's, Lightning's); every `step()` of
            the optimizer counts. A replayed CUDA graph runs no hooks: call `diagnose` there. With
            `GradientRelease`, `optimizer.step()` must stay in the loop after backward.
        images: the batch to measure on, always the same, so that what changes is the network.
        log: called as `log(report.as_dict(), step)`, as `wandb.log` and `mlflow.log_metrics` are.
        every: steps from one report to the next, 100 by default.

    Returns:
        A handle: its `remove()` ends the logging, as does leaving it as a context manager.

    Raises:
        TypeError: `log` cannot be called.
        ValueError: `every` is not a positive whole number.
    """
    if not callable(log):
        raise TypeError(f"log must be a function of a dictionary and a step, but was {log!r}")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive whole number of steps, but was {every!r}")
    inner = _innermost(optimizer)
    _groups_of(_unwrapped(model), inner)
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            log(diagnose(model, images, optimizer).as_dict(), steps)

    return inner.register_step_post_hook(after_step)


_NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def _complaints(
    model: nn.Module, layers: tuple[LayerDiagnostics, ...], spread: float | None
) -> Iterator[str]:
    """Say what is dead or explodes, and the remedy."""
    # A normalisation makes the spread before it irrelevant, and rescales what comes after it once
    # it has seen batches.
    normalised = any(isinstance(module, _NORMALISATIONS) for module in model.modules())
    dead, exploded = (0.0, float("inf")) if normalised else (DEAD, EXPLODED)
    remedy = "measure the start on data, czm_init_(model, example_input=images)"
    spreads = {layer.name: layer.output_spread for layer in layers}
    ran = {name: each for name, each in spreads.items() if each is not None}
    for names, what, else_remedy in (
        ([n for n, s in ran.items() if s <= dead], f"dead, with a spread of {dead:g} or less", ""),
        (
            [n for n, s in ran.items() if not s < exploded],
            "exploding" if normalised else f"exploding, with a spread of {exploded:g} or more",
            ", or lower the learning rate",
        ),
    ):
        if names:
            yield f"the outputs of {shorten(names)} are {what}; {remedy}{else_remedy}"
    if spread is not None and spread <= dead:
        yield (
            f"the output of the model is dead, with a spread of {spread:.1e} over the "
            f"batch; {remedy}, or look at the classifier's weights"
        )
    elif spread is not None and not spread < exploded:
        yield f"the output of the model explodes, with a spread of {spread:.1e}; {remedy}"


def _measure(
    name: str,
    depth: int,
    convolution: Convolution,
    signals: Signals,
    groups: dict[Tensor, dict[str, Any]],
    optimizer: Optimizer | None,
) -> LayerDiagnostics:
    weight = _whole(convolution.weight)
    trained, scale = _direction(convolution, weight, groups, optimizer)
    norms = filter_norms(weight)
    direction_norms = norms / scale
    slices = weight.to(norms.dtype).flatten(2)
    means = slices.mean(dim=2, keepdim=True).expand_as(slices)
    distances = filter_norms(means) / torch.where(norms > 0, norms, 1)
    lr = float(groups[trained]["lr"]) if trained in groups else None
    return LayerDiagnostics(
        name=name,
        depth=depth,
        filters=len(weight),
        gain=_spread(norms),
        output_spread=signals.output_spread(),
        direction_norm=_spread(direction_norms),
        scale=_spread(scale),
        isocline_distance=_spread(distances),
        shift_gain=slices.sum(dim=2).square().sum(dim=1).mean().sqrt().item(),
        signal_gain=signals.gain(),
        effective_lr=None if lr is None else _spread(lr / direction_norms.square()),
    )


def _direction(
    convolution: Any,
    weight: Tensor,
    groups: dict[Tensor, dict[str, Any]],
    optimizer: Optimizer | None,
) -> tuple[Tensor, Tensor]:
    """Return the parameter that the optimizer steps, and the scale exp(g) of each filter."""
    if parametrize.is_parametrized(convolution, "weight"):
        stored = convolution.parametrizations.weight
        if isinstance(stored[0], ExpScale):
            return stored.original0, _whole(stored.original1).exp()
    trained: Tensor = convolution.weight
    state = {} if optimizer is None else optimizer.state.get(trained, {})
    # A group that scales no more keeps g, which its steps leave out.
    if "log_scale" in state and groups.get(trained, {}).get("exp_scale", True):
        return trained, _whole(state["log_scale"]).exp()
    if isinstance(optimizer, FusedCZMSGD) and groups.get(trained, {}).get("exp_scale"):
        # The first step of the optimizer starts from g = log ‖W‖, and from 0 where W = 0.
        norms = filter_norms(weight)
        return trained, torch.where(norms > 0, norms, 1)
    return trained, torch.ones_like(filter_norms(weight))


def _whole(x: Any) -> Tensor:
    """Return a tensor that may be sharded, a DTensor, as a plain one."""
    gathered: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return gathered.detach()


def _innermost(optimizer: Any) -> Any:
    """Return the torch optimizer in wrappers of it, as Accelerate and Lightning make them."""
    while True:
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
        if not isinstance(inner, Optimizer):
            return optimizer
        optimizer = inner


def _groups_of(model: nn.Module, optimizer: Optimizer | None) -> dict[Tensor, dict[str, Any]]:
    """Return the optimizer's group of each parameter."""
    if optimizer is None:
        return {}
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or None, but was {type(optimizer).__name__}"
        )
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    if not any(parameter in groups for parameter in model.parameters()):
        raise ValueError(
            "optimizer must train the model, but holds none of its parameters; "
            "make it after converting or moving the model"
        )
    return groups


def _spread(values: Tensor) -> Spread:
    if len(values) == 0:
        return Spread(float("nan"), float("nan"), float("nan"))
    return Spread(*(x.item() for x in (values.quantile(0.5), values.min(), values.max())))


def _format(quantity: str, value: Spread | float | None) -> str:
    if isinstance(value, Spread):
        return f"{value.median:.3g} [{value.min:.3g}, {value.max:.3g}]"
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1f} dB" if quantity == "rejection_db" else f"{value:.3g}"


def _is_finite(value: Spread | float | None) -> bool:
    if value is None:
        return False
    return math.isfinite(value.median if isinstance(value, Spread) else value)


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but was {type(model).__name__}")
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is None else _unwrapped(inner)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run what is compiled eagerly: new hooks would have it compiled anew at every report."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
