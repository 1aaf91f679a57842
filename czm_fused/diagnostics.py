"""What a layer's filters look like while they are trained, and how far they reject mean shift."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from czm_fused._internal.text import format_table
from czm_fused.example import preserved, run_example
from czm_fused.init import Convolution, named_convolutions
from czm_fused.nn import ExpScale
from czm_fused.reference import compute_dtype, filter_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log: TypeAlias = Callable[[dict[str, float], int], object]
"""What takes quantities by name, and the number of steps taken."""


@dataclass(frozen=True)
class Spread:
    """The median and the range of a quantity over the filters of a layer."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class LayerDiagnostics:
    """The state of one convolution, W[f] = exp(g[f]) V[f]; None is what cannot be known.

    Attributes:
        name: its dotted name.
        filters: how many it has.
        direction_norm: ‖V[f]‖, which LUMA holds near 1 (paper section 3.4).
        scale: exp(g[f]) (section 3.1).
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
    filters: int
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
        ratio = torch.tensor(self.signal_gain, dtype=torch.float64) / self.shift_gain
        return 20 * ratio.log10().item()


SPREADS = ("direction_norm", "scale", "isocline_distance", "effective_lr")
GAINS = ("shift_gain", "signal_gain", "rejection_db")
"""The quantities of a layer, which are the fields and properties of `LayerDiagnostics`."""

_LABELS = {
    "direction_norm": "direction norm ‖V‖",
    "scale": "scale exp(g)",
    "isocline_distance": "distance from the isocline",
    "rejection_db": "common-mode rejection, dB",
    "effective_lr": "effective learning rate",
}


@dataclass(frozen=True)
class Report:
    """The state of every convolution of a network; printed, a table of medians and ranges.

    Attributes:
        layers: the convolutions, in the order of registration.
    """

    layers: tuple[LayerDiagnostics, ...]

    def as_dict(self) -> dict[str, float]:
        """Return what is known as numbers by name, for loggers.

        The names are `layer/quantity`; of what varies over the filters, that is the median, beside
        `layer/quantity_min` and `layer/quantity_max`.
        """
        numbers: dict[str, float] = {}
        for layer in self.layers:
            for quantity in SPREADS:
                spread: Spread | None = getattr(layer, quantity)
                if spread is not None:
                    key = f"{layer.name}/{quantity}"
                    numbers[key] = spread.median
                    numbers[f"{key}_min"], numbers[f"{key}_max"] = spread.min, spread.max
            for quantity in GAINS:
                gain: float | None = getattr(layer, quantity)
                if gain is not None:
                    numbers[f"{layer.name}/{quantity}"] = gain
        return numbers

    def plot(self) -> Figure:
        """Draw each quantity over the layers: medians with the filters' ranges.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'czm-fused[train]'") from error

        figure = Figure(figsize=(8, 11), layout="constrained")
        places = range(len(self.layers))
        panels = figure.subplots(len(_LABELS), sharex=True)
        for axes, (quantity, label) in zip(panels, _LABELS.items(), strict=True):
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            values = [getattr(layer, quantity) for layer in self.layers]
            known = [(place, v) for place, v in zip(places, values, strict=True) if v is not None]
            if quantity in SPREADS:
                axes.vlines(
                    [place for place, _ in known],
                    [spread.min for _, spread in known],
                    [spread.max for _, spread in known],
                    alpha=0.4,
                )
                known = [(place, spread.median) for place, spread in known]
            axes.plot([place for place, _ in known], [value for _, value in known], ".")
        panels[-1].set_xticks(places, [layer.name for layer in self.layers], rotation=90, size=6)
        return figure

    def __str__(self) -> str:
        header = ("layer", "filters", "‖V‖", "exp(g)", "off isocline", "rejection", "effective lr")
        rows = [header]
        for layer in self.layers:
            rejection = layer.rejection_db
            rows.append(
                (
                    layer.name,
                    str(layer.filters),
                    _format(layer.direction_norm),
                    _format(layer.scale),
                    _format(layer.isocline_distance),
                    "-" if rejection is None else f"{rejection:.1f} dB",
                    _format(layer.effective_lr),
                )
            )
        return format_table(rows, right_aligned=range(1, len(header)))


def diagnose(model: nn.Module, images: Any, optimizer: Optimizer | None = None) -> Report:
    """Measure every convolution of `model` on a batch, and leave everything as it was.

    One forward pass, in eval mode and without gradients. Modes, buffers and torch's generators are
    restored. Works for any network, with BatchNorm as well; a wrapper of DDP or `torch.compile` is
    looked through. Transposed convolutions are not measured.

    Args:
        model: the network.
        images: the batch: a tensor, a tuple of positional or a dictionary of keyword arguments.
        optimizer: what trains the model. `FusedCZMSGD` knows the log-scales g, as the parameters
            of `exp_scale(conv)` do; without, V is W itself and the scale 1. It also gives the
            learning rates.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.
        ValueError: the model has no convolution, none runs on `images`, a lazy one has no weight
            yet, or `optimizer` trains none of the model's parameters.
    """
    model = _unwrapped(model)
    convolutions = named_convolutions(model)
    if not convolutions:
        raise ValueError("model must have a convolution, but has none")
    _reshard(model)
    learning_rates = _learning_rates(model, optimizer)
    with torch.no_grad():
        layers = [
            _measure(name, convolution, learning_rates, optimizer)
            for name, convolution in convolutions.items()
        ]
    gains = {name: _SignalGain() for name in convolutions}
    hooks = [
        convolution.register_forward_pre_hook(gains[name].add, with_kwargs=True)
        for name, convolution in convolutions.items()
    ]
    try:
        with preserved(model), _uncompiled():
            run_example(model.eval(), images)
    finally:
        for hook in hooks:
            hook.remove()
        _reshard(model)
    if not any(gain.ran for gain in gains.values()):
        raise ValueError("images must reach a convolution of the model, but none ran on them")
    return Report(tuple(replace(layer, signal_gain=gains[layer.name].value()) for layer in layers))


def watch(
    model: nn.Module, optimizer: Optimizer, images: Any, *, log: Log, every: int = 100
) -> RemovableHandle:
    """Log the diagnostics of `model` after every `every` steps of `optimizer`, on one batch.

    Args:
        model: the network.
        optimizer: what trains it; its `step()` is what is counted. A replayed CUDA graph runs no
            hooks: call `diagnose` there.
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
    _learning_rates(_unwrapped(model), optimizer)
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            log(diagnose(model, images, optimizer).as_dict(), steps)

    return optimizer.register_step_post_hook(after_step)


@dataclass
class _SignalGain:
    """Collects the power of a convolution's zero-mean input, and of what it makes of it."""

    ran: bool = False
    powers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, convolution: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        self.ran = True
        # A convolution also takes an image without the batch's dimension.
        space = tuple(range(2 - convolution.weight.dim(), 0))
        dtype = compute_dtype(x.dtype)
        signal = x.to(dtype) - x.to(dtype).mean(dim=space, keepdim=True)
        signal = signal.to(x.dtype)
        response = convolution._conv_forward(signal, convolution.weight, None)
        self.powers.append((_mean_square(signal), _mean_square(response)))

    def value(self) -> float | None:
        if not self.powers:
            return None
        given, returned = (torch.stack(p).sum() for p in zip(*self.powers, strict=True))
        return None if given == 0 else (returned / given).sqrt().item()


def _mean_square(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)).square().mean()


def _measure(
    name: str,
    convolution: Convolution,
    learning_rates: dict[Tensor, float],
    optimizer: Optimizer | None,
) -> LayerDiagnostics:
    weight = _whole(convolution.weight)
    trained, scale = _direction(convolution, weight, optimizer)
    norms = filter_norms(weight)
    direction_norms = norms / scale
    slices = weight.to(norms.dtype).flatten(2)
    means = slices.mean(dim=2, keepdim=True).expand_as(slices)
    distances = filter_norms(means) / torch.where(norms > 0, norms, 1)
    lr = learning_rates.get(trained)
    return LayerDiagnostics(
        name,
        len(weight),
        _spread(direction_norms),
        _spread(scale),
        _spread(distances),
        slices.sum(dim=2).square().sum(dim=1).mean().sqrt().item(),
        None,
        None if lr is None else _spread(lr / direction_norms.square()),
    )


def _direction(
    convolution: Any, weight: Tensor, optimizer: Optimizer | None
) -> tuple[Tensor, Tensor]:
    """Return the parameter that the optimizer steps, and the scale exp(g) of each filter."""
    if parametrize.is_parametrized(convolution, "weight"):
        stored = convolution.parametrizations.weight
        if isinstance(stored[0], ExpScale):
            return stored.original0, _whole(stored.original1).exp()
    trained: Tensor = convolution.weight
    state = {} if optimizer is None else optimizer.state.get(trained, {})
    if "log_scale" in state:
        return trained, _whole(state["log_scale"]).exp()
    return trained, torch.ones_like(filter_norms(weight))


def _reshard(model: nn.Module) -> None:
    """Put the optimizer's parameters back, which FSDP leaves out after a pass without backward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _whole(x: Any) -> Tensor:
    """Return a tensor that may be sharded, a DTensor, as a plain one."""
    gathered: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return gathered.detach()


def _learning_rates(model: nn.Module, optimizer: Optimizer | None) -> dict[Tensor, float]:
    if optimizer is None:
        return {}
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or None, but was {type(optimizer).__name__}"
        )
    rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    if not any(parameter in rates for parameter in model.parameters()):
        raise ValueError(
            "optimizer must train the model, but holds none of its parameters; "
            "make it after converting or moving the model"
        )
    return rates


def _spread(values: Tensor) -> Spread:
    if len(values) == 0:
        return Spread(float("nan"), float("nan"), float("nan"))
    return Spread(*(x.item() for x in (values.quantile(0.5), values.min(), values.max())))


def _format(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.3g} [{spread.min:.3g}, {spread.max:.3g}]"


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
