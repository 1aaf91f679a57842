"""calibrate_(): a start for every convolution, measured on the user's own data."""

# torch is typed in part.
# mypy: allow-untyped-calls, no-warn-return-any

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.utils import _ntuple
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from czm_fused._internal.holders import shared_parameters
from czm_fused._internal.residual import branch_ends
from czm_fused._internal.sharding import check_not_sharded
from czm_fused._internal.signals import input_of, is_empty, output_spread, spread
from czm_fused._internal.text import Tabular, shorten
from czm_fused._internal.undo import undone_on_error
from czm_fused.example import first_that_runs, hooked, preserved, run_checked, run_example
from czm_fused.init import Convolution, check_positive, is_depthwise, named_convolutions
from czm_fused.ops.step.reference import filter_norms
from czm_fused.ops.step.spec import compute_dtype

TARGET = 1.0
"""The spread that the output of a convolution starts with."""

BRANCH = 0.5
"""The spread of the last convolution of a residual branch, as a share of the target."""

NOISE_BATCH = 32
NOISE_SIZES = {3: (256, 1024), 4: (64, 32, 28, 96, 224), 5: (32, 16)}
"""Lengths of the spatial dimensions to try for a batch of noise, by its number of dimensions."""

DEAD, EXPLODED = 1e-3, 1e3
"""Spreads of the model's output outside of which a start is warned about."""

NEVER_RAN, CONSTANT, NOT_FINITE = "never ran", "constant output", "output not finite"
COMPUTED = "weight computed by a hook"

REMEDIES = {
    NEVER_RAN: "pass an example_input that reaches them, or set their scale by hand",
    CONSTANT: "pass a batch of different real inputs, and look at what comes before them",
    NOT_FINITE: "look for a division or an overflow before them",
    COMPUTED: "remove the hook, or calibrate before it is registered",
}
"""What to do about convolutions that are left as they are."""


@dataclass(frozen=True)
class LayerStart:
    """The start of one convolution.

    Attributes:
        name: its dotted name.
        gain: the norm of its filters after calibration, the median over the filters.
        before: the spread of its output with the weight as it was, its input calibrated; NaN if it
            never ran.
        after: the spread after calibration.
        remark: "branch" for the last convolution of a residual branch; or why it is as it was.
    """

    name: str
    gain: float
    before: float
    after: float
    remark: str = ""


@dataclass(frozen=True)
class CalibrationReport(Tabular):
    """What `calibrate_` measured and set; printed, a table.

    The spread of a tensor is its standard deviation over samples and positions, the root mean
    square over channels.

    Attributes:
        layers: the convolutions in the order of execution, then those that never ran.
        output_before: the spread of the model's first output before calibration.
        output_after: the same after it.
        notes: in words, what was decided and what is wrong.
    """

    layers: tuple[LayerStart, ...]
    output_before: float
    output_after: float
    notes: tuple[str, ...] = ()

    _right_aligned = (1, 2, 3)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "gain", "spread before", "after", "remark")]
        for layer in self.layers:
            numbers = (f"{x:.3g}" for x in (layer.gain, layer.before, layer.after))
            rows.append((layer.name, *numbers, layer.remark))
        rows.append(("output", "", f"{self.output_before:.3g}", f"{self.output_after:.3g}", ""))
        return rows


def calibrate_(
    model: nn.Module,
    example_input: Any = None,
    *,
    target: float = TARGET,
    branch: float = BRANCH,
    center: bool = True,
    weigh_taps: bool = False,
    only: Collection[str] | None = None,
    seed: int = 0,
) -> CalibrationReport:
    """Give the output of every convolution of `model` the same spread and the mean 0, in place.

    One pass over `example_input` in the order of execution. Each convolution, before the next one
    sees its output, has all its filters multiplied by one factor, so that the standard deviation of
    its output over samples and positions is `target`, and its bias set so that the mean of every
    channel is 0 (Salimans and Kingma, arXiv 1602.07868, section 3, by layer instead of by filter):

        s    = target / sqrt(mean_f var(W[f] * x))
        W[f] <- s W[f]
        b[f] <- -mean(W[f] * x)

    The last convolution of a residual branch, whose output is added to a shortcut, gets the spread
    `branch * target`, so that the shortcut carries the signal. Nothing else is changed: directions
    of filters (but with `weigh_taps`), linear layers, buffers, modes and the state of torch's
    generators stay.

    A convolution that runs several times, or shares its weight, is set at its first run. One that
    runs in training mode alone (an auxiliary head) is set in a pass of its own in that mode.
    Transposed convolutions are left as they are. The output of a convolution is what it computes
    before its forward hooks run.

    Args:
        model: the network, initialised by `czm_init_` or by `convert`, on any device; not
            compiled or sharded.
        example_input: a batch of real inputs, 16 or more: a tensor, a tuple of positional or a
            dictionary of keyword arguments. If None, noise with as much power in every octave, as
            natural images have, with the channels of the first convolution and 64 pixels, or
            another usual size if the model does not take that.
        target: the spread of the output of a convolution. Default 1.
        branch: the spread of a residual branch as a share of `target`. Default 0.5.
        center: whether biases are set; False leaves them. One that several modules share is left
            anyhow. Default True.
        weigh_taps: whether each tap of a filter is first multiplied by the share of its positions
            at which it meets the input, not the padding. A 3x3 filter on a map of one position has
            one tap that meets it: the others would only add to the norm that its direction learns
            against. Depthwise filters, which did not gain, are left. `convert` and `czm_init_` do
            this to filters that keep their means. Twice on one model weighs twice. Default False.
        only: the dotted names of the convolutions that are set; the others stay as they are. None,
            the default: all.
        seed: of the noise. Default 0.

    Returns:
        A report: the gain and the spread of every layer, and the spread of the model's output
        before and after.

    Raises:
        TypeError: `only` is a string.
        ValueError: `target` or `branch` is not a positive number; the model is sharded, on the meta
            device or has no convolution; `only` is empty, or names what is none; `example_input`
            is one sample, constant, not finite, of another dtype or device than the model, or
            reaches no convolution; or the model fails on it in eval mode. The model is as it was
            then.

    Warns:
        UserWarning: a convolution never ran, or its output is constant or not finite (it is left as
            it was), or the output of the model is dead or explodes; with the names and the remedy.
    """
    check_positive("target", target)
    check_positive("branch", branch)
    convolutions = named_convolutions(model)
    check_not_sharded(model)
    if not convolutions:
        raise ValueError("model must have a convolution, but had none; there is nothing to scale")
    if only is not None:
        convolutions = _chosen(convolutions, only)
    if any(each.weight.is_meta for each in convolutions.values()):
        raise ValueError(
            "model must have weights to measure with, but is on the meta device; call "
            "model.to_empty(device=...) first, or start by `gain`, which measures nothing"
        )
    notes: list[str] = []
    if example_input is None:
        example_input = _noise_for(model, convolutions, seed)
        size = "x".join(map(str, example_input.shape))
        notes.append(f"measured on noise, {size}: a batch of real inputs gives a better start")
    else:
        _check_example(convolutions, example_input)

    shared = shared_parameters(model)
    centered = {name for name, c in convolutions.items() if center and id(c.bias) not in shared}
    with undone_on_error(model, convolutions.values()), preserved(model):
        _to_measuring_mode(model)
        output_before = _output_spread(run_checked(model, example_input))
        ends: set[str] = set()
        try:
            ends = branch_ends(model, convolutions, example_input)
        except Exception as error:
            notes.append(
                "residual branches were not told from the rest, as a forward pass with gradients "
                f"failed ({type(error).__name__}: {error})"
            )
        calibration = _Calibration(convolutions, ends, target, branch, centered, weigh_taps)
        with calibration.hooked():
            output = run_checked(model, example_input)
        output_after = _output_spread(output)
        if not calibration.layers:
            raise ValueError(
                "example_input must reach a convolution of the model, but none ran on it; "
                "pass what the model takes in training"
            )
        if len(calibration.layers) < len(convolutions):
            model.train()
            try:
                with calibration.hooked():
                    run_example(model, example_input)
            except Exception as error:
                notes.append(
                    "what runs in training mode alone was not measured, as the forward pass "
                    f"failed there ({type(error).__name__}: {error})"
                )
    layers = calibration.all_layers()
    complaints = [*_layer_complaints(layers), *_output_complaints(output_after, output)]
    for complaint in complaints:
        warnings.warn(complaint, stacklevel=2)
    return CalibrationReport(layers, output_before, output_after, (*notes, *complaints))


class _Calibration:
    """Sets convolutions as they run, each at its first run."""

    def __init__(
        self,
        convolutions: dict[str, Convolution],
        ends: set[str],
        target: float,
        branch: float,
        centered: set[str],
        weigh_taps: bool,
    ) -> None:
        self.convolutions = convolutions
        self.names = {convolution: name for name, convolution in convolutions.items()}
        self.targets = {name: target * (branch if name in ends else 1) for name in convolutions}
        self.ends = ends
        self.centered = centered
        self.weigh_taps = weigh_taps
        self.layers: dict[str, LayerStart] = {}
        self.owners: dict[int, str] = {}

    def hooked(self) -> AbstractContextManager[None]:
        # First, so that hooks of the user's, which may not be linear, run on what it returns.
        return hooked(
            [
                each.register_forward_hook(self._set, prepend=True, with_kwargs=True)
                for each in self.names
            ]
        )

    def _set(
        self, convolution: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        name = self.names[convolution]
        if name in self.layers or output.numel() == 0:
            return None
        before = spread(output)
        why_not = self._why_not(convolution, before)
        if why_not:
            self._record(name, before, before, why_not)
            return None
        measured = before
        if self.weigh_taps and not is_depthwise(convolution):
            coverage = tap_coverage(convolution, input_of(args, kwargs).shape, output.shape)
            _multiply_weight(convolution, coverage.to(convolution.weight))
            output = convolution.forward(*args, **kwargs)
            measured = spread(output)
        factor = self.targets[name] / measured
        _multiply_weight(convolution, factor)
        self._record(name, before, self.targets[name], "branch" if name in self.ends else "")
        if convolution.bias is None:
            return output * factor
        shape = (-1, *[1] * (convolution.weight.dim() - 2))
        result = (output - convolution.bias.view(shape)) * factor
        if name in self.centered:
            space = tuple(range(-len(shape) + 1, 0))
            means = result.to(compute_dtype(result.dtype)).mean(dim=space)
            convolution.bias.copy_(-(means.mean(dim=0) if means.dim() > 1 else means))
        return result + convolution.bias.view(shape)

    def _why_not(self, convolution: Any, before: float) -> str:
        """Return why a convolution is left as it is, or nothing."""
        name = owner = self.names[convolution]
        for parameter in _parameters(convolution):
            owner = self.owners.setdefault(id(parameter), owner)
        if owner != name:
            return f"shares the weight of {owner!r}"
        if not _parameters(convolution):
            return COMPUTED
        if before == 0:
            return CONSTANT
        return "" if math.isfinite(before) else NOT_FINITE

    def _record(self, name: str, before: float, after: float, remark: str) -> None:
        self.layers[name] = LayerStart(name, _gain(self.convolutions[name]), before, after, remark)

    def all_layers(self) -> tuple[LayerStart, ...]:
        missing = [
            LayerStart(name, _gain(convolution), math.nan, math.nan, NEVER_RAN)
            for name, convolution in self.convolutions.items()
            if name not in self.layers
        ]
        return (*self.layers.values(), *missing)


def _layer_complaints(layers: tuple[LayerStart, ...]) -> Iterator[str]:
    for remark, remedy in REMEDIES.items():
        names = [layer.name for layer in layers if layer.remark == remark]
        if names:
            yield f"convolutions left as they were ({remark}): {shorten(names)}; {remedy}"


def _output_complaints(spread: float, output: Any) -> Iterator[str]:
    look = "look at the initialisation of what follows the last convolution, as the classifier"
    if spread < DEAD:
        yield f"the model starts dead, its output with a spread of {spread:.1e}; {look}"
    elif spread > EXPLODED:
        yield f"the model starts exploded, its output with a spread of {spread:.1e}; {look}"
    elif is_empty(output):
        yield (
            "the model's output is empty, as of a detector without detections; its start is unknown"
        )
    elif math.isnan(spread):
        yield "the model's output holds no floating-point tensor, or NaN; its start is unknown"


def tap_coverage(convolution: Convolution, inputs: torch.Size, outputs: torch.Size) -> Tensor:
    """Return, for each tap, the share of the positions at which it meets the input, not padding.

    Args:
        convolution: with kernels of the shape of the result.
        inputs: the shape of its input, with dimensions of space last.
        outputs: the shape of its output.
    """
    coverage = torch.ones((), device="cpu")
    kernel = convolution.weight.shape[2:]
    per_dimension = _ntuple(len(kernel))
    dilations, strides = map(per_dimension, (convolution.dilation, convolution.stride))
    padding: Any = 0 if convolution.padding == "valid" else convolution.padding
    if padding == "same":
        # An odd sum leaves one more behind than before.
        padding = [d * (taps - 1) // 2 for d, taps in zip(dilations, kernel, strict=True)]
    for axis, before in enumerate(per_dimension(padding)):
        share = torch.ones(kernel[axis], device="cpu")
        if convolution.padding_mode == "zeros":
            size, positions = inputs[axis - len(kernel)], outputs[axis - len(kernel)]
            starts = torch.arange(positions, device="cpu") * strides[axis] - before
            at = starts[:, None] + torch.arange(kernel[axis], device="cpu") * dilations[axis]
            share = ((at >= 0) & (at < size)).float().mean(dim=0)
        coverage = coverage[..., None] * share
    return coverage


def _multiply_weight(convolution: Any, factor: Tensor | float) -> None:
    if parametrize.is_parametrized(convolution, "weight"):
        convolution.weight = convolution.weight * factor
    else:
        convolution.weight.mul_(factor)


def _parameters(convolution: Any) -> list[Tensor]:
    """Return the tensors that hold the weight."""
    if parametrize.is_parametrized(convolution, "weight"):
        return list(convolution.parametrizations.weight.parameters())
    weight = convolution._parameters.get("weight")
    return [] if weight is None else [weight]


def _gain(convolution: Convolution) -> float:
    return filter_norms(convolution.weight.detach()).median().item()


def _output_spread(output: Any) -> float:
    measured = output_spread(output)
    return math.nan if measured is None else measured


def _to_measuring_mode(model: nn.Module) -> None:
    """Turn dropout and noise off, but let the normalisations that stay normalise."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train()


def _chosen(convolutions: dict[str, Convolution], only: Collection[str]) -> dict[str, Convolution]:
    """Return those of `convolutions` that `only` names."""
    if isinstance(only, str):
        raise TypeError(f"only must be a collection of names, but was {only!r}; write [{only!r}]")
    unknown = [
        f"{name!r} (the nearest is {get_close_matches(str(name), convolutions, 1, cutoff=0)[0]!r})"
        for name in only
        if name not in convolutions
    ]
    if unknown:
        raise ValueError(f"only must name convolutions of the model, but named {shorten(unknown)}")
    if not only:
        raise ValueError("only must name a convolution of the model, but was empty; None sets all")
    return {name: each for name, each in convolutions.items() if name in only}


def _check_example(convolutions: dict[str, Convolution], example_input: Any) -> None:
    tensors = [x for x in tree_leaves(example_input) if isinstance(x, Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    remedy = "pass 16 or more different real inputs"
    if not tensors:
        raise ValueError(
            "example_input must be a tensor, or a tuple or dictionary with one, but was "
            f"{type(example_input).__name__}; {remedy}"
        )
    if all(x.dim() == 0 or len(x) < 2 for x in tensors):
        raise ValueError(f"example_input must be a batch, but was one sample or none; {remedy}")
    weight = next(iter(convolutions.values())).weight
    for x in tensors:
        if x.device != weight.device:
            raise ValueError(
                f"example_input must be on the model's device, {weight.device}, but was on "
                f"{x.device}; move it there with .to({str(weight.device)!r})"
            )
    for x in floats:
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"example_input must have the model's dtype, {weight.dtype}, but had {x.dtype}; "
                f"convert it with .to({weight.dtype})"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"example_input must be finite, but has NaN or infinity; {remedy}")
    if floats and all(_is_constant(x) for x in floats):
        raise ValueError(
            f"example_input must vary from sample to sample, but is constant; {remedy}"
        )


def _is_constant(x: Tensor) -> bool:
    return x.dim() == 0 or bool((x == x[:1]).all())


def _noise_for(model: nn.Module, convolutions: dict[str, Convolution], seed: int) -> Tensor:
    """Return a batch of noise that the model takes, of its dtype and on its device."""
    stem = next(
        (c for c in convolutions.values() if getattr(c, "stem", False) is True),
        next(iter(convolutions.values())),
    )
    weight = stem.weight
    shapes = (
        (NOISE_BATCH, stem.in_channels, *[size] * (weight.dim() - 2))
        for size in NOISE_SIZES[weight.dim()]
    )
    noises = (_image_noise(each, seed).to(weight.device, weight.dtype) for each in shapes)
    return first_that_runs(model, _to_measuring_mode, noises, "noise")


def _image_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return noise of unit spread with as much power in every octave, as natural images have."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = shape[2]
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(shape)]
    total = torch.zeros(shape, device="cpu")
    for octave in range(1, int(math.log2(size)) + 1):
        coarse_shape = (*shape[:2], *[2**octave] * (len(shape) - 2))
        coarse = torch.randn(coarse_shape, generator=generator, device="cpu")
        total += F.interpolate(coarse, shape[2:], mode=mode, align_corners=False)
    return total / total.std()
