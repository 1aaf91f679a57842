"""calibrate_(): the scale that every convolution starts with, measured on the user's own data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from czm_fused._internal.text import format_table, shorten
from czm_fused.example import preserved, run_example
from czm_fused.init import Convolution, named_convolutions

TARGET = 1.0
"""The spread that the output of a convolution starts with."""

BRANCH = 0.5
"""The spread of the last convolution of a residual branch, as a share of the target."""

NOISE_BATCH = 32
NOISE_SIZES = {3: (256,), 4: (32, 64, 96, 224), 5: (16, 32)}
"""Lengths of the spatial dimensions to try for a batch of noise, by its number of dimensions."""

DEAD, EXPLODED = 1e-3, 1e3
"""Spreads of the model's output outside of which a start is warned about."""


@dataclass(frozen=True)
class LayerStart:
    """The start of one convolution.

    Attributes:
        name: its dotted name.
        gain: the norm of its filters after calibration, the median over the filters.
        before: the spread of its output with the weight as it was, its input calibrated; NaN if it
            never ran.
        after: the spread after calibration.
        remark: "branch" for the last convolution of a residual branch; or why it was left alone.
    """

    name: str
    gain: float
    before: float
    after: float
    remark: str = ""


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate_` measured and set; printed, a table.

    The spread of a tensor is its standard deviation over images and positions, the root mean square
    over channels.

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

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "gain", "spread before", "after", "remark")]
        for layer in self.layers:
            numbers = (f"{x:.3g}" for x in (layer.gain, layer.before, layer.after))
            rows.append((layer.name, *numbers, layer.remark))
        rows.append(("output", "", f"{self.output_before:.3g}", f"{self.output_after:.3g}", ""))
        return rows

    def __str__(self) -> str:
        return "\n".join([format_table(self._rows(), right_aligned=(1, 2, 3)), *self.notes])

    def _repr_html_(self) -> str:
        header, *rows = self._rows()
        lines = ["<table><thead><tr>", *(f"<th>{escape(cell)}</th>" for cell in header)]
        lines.append("</tr></thead><tbody>")
        for row in rows:
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
        lines.append("</tbody></table>")
        return "".join([*lines, *(f"<p>{escape(note)}</p>" for note in self.notes)])


def calibrate_(
    model: nn.Module,
    example_input: Any = None,
    *,
    target: float = TARGET,
    branch: float = BRANCH,
    seed: int = 0,
) -> CalibrationReport:
    """Scale every convolution of `model` in place so that its output starts with one spread.

    One pass over `example_input` in the order of execution: the filters of a convolution are all
    multiplied by one factor, which brings the standard deviation of its output, over images and
    positions, to `target`, before the next convolution sees it. The last convolution of a residual
    branch, the one whose output is added to a shortcut, is brought to `branch * target`. Nothing
    else of the model is changed: directions of filters, biases, linear layers, buffers, modes and
    the state of torch's generators stay.

    A convolution that runs several times, or shares its weight, is scaled at its first run. One
    that runs in training mode alone (an auxiliary head) is scaled in a second pass in that mode.
    Transposed convolutions are left alone.

    Args:
        model: the network, initialised by `czm_init_` or by `convert`; on any device.
        example_input: a batch of real inputs, 16 or more: a tensor, a tuple of positional or a
            dictionary of keyword arguments. If None, noise with the spectrum of images, of the
            channels of the first convolution and 32 to 224 pixels.
        target: the spread of the output of a convolution. Default 1.
        branch: the spread of a residual branch as a share of `target`. Default 0.5.
        seed: of the noise. Default 0.

    Returns:
        A report: the gain and the spread of every layer, and the spread of the model's output
        before and after.

    Raises:
        ValueError: `target` or `branch` is not a positive number; the model has no convolution;
            `example_input` is one sample, constant, not finite, or of another dtype or device than
            the model; or the model fails on it in eval mode. Nothing has been changed then.

    Warns:
        UserWarning: a convolution never ran or its output is constant (it keeps its weight), or the
            output of the model is dead or explodes; with the names and the remedy.
    """
    for name, value in (("target", target), ("branch", branch)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, but was {value}")
    convolutions = named_convolutions(model)
    if not convolutions:
        raise ValueError("model must have a convolution, but has none; there is nothing to scale")
    notes: list[str] = []
    if example_input is None:
        example_input = _noise_for(model, convolutions, seed)
        size = "x".join(map(str, example_input.shape))
        notes.append(f"measured on noise, {size}: pass a batch of real inputs for a better start")
    else:
        _check_example(convolutions, example_input)

    pass_ = _Calibration(convolutions, target, branch)
    with _undone_on_error(convolutions), preserved(model):
        _to_measuring_mode(model)
        output_before = _output_spread(_run(model, example_input))
        pass_.branch_ends = _branch_ends(model, convolutions, example_input)
        with pass_.hooked():
            _run(model, example_input)
        if not pass_.layers:
            raise ValueError(
                "example_input must reach a convolution of the model, but none ran on it"
            )
        if len(pass_.layers) < len(convolutions):
            _run_training_mode(model, example_input, pass_, notes)
        _to_measuring_mode(model)
        output_after = _output_spread(_run(model, example_input))
    notes += pass_.complaints()
    notes += _output_complaints(output_after)
    for note in notes:
        if note.startswith("warning: "):
            warnings.warn(note.removeprefix("warning: "), stacklevel=2)
    return CalibrationReport(tuple(pass_.all_layers()), output_before, output_after, tuple(notes))


class _Calibration:
    """Scales convolutions as they run, each at its first run."""

    def __init__(
        self, convolutions: dict[str, Convolution], target: float, branch: float
    ) -> None:
        self.convolutions = convolutions
        self.names = {convolution: name for name, convolution in convolutions.items()}
        self.target = target
        self.branch = branch
        self.branch_ends: set[str] = set()
        self.layers: dict[str, LayerStart] = {}
        self.scaled_weights: dict[int, str] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        hooks = [each.register_forward_hook(self._scale) for each in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _scale(self, convolution: Any, _: Any, output: Tensor) -> Tensor | None:
        name = self.names[convolution]
        if name in self.layers:
            return None
        before = _spread(output)
        stored = _stored_weight(convolution)
        owner = self.scaled_weights.setdefault(id(stored), name)
        remark = "branch" if name in self.branch_ends else ""
        if owner != name:
            self.layers[name] = self._layer(name, before, before, f"shares {owner!r}'s weight")
            return None
        if not 0 < before < math.inf:
            remark = "constant output" if before == 0 else "output not finite"
            self.layers[name] = self._layer(name, before, before, remark)
            return None
        target = self.target * (self.branch if name in self.branch_ends else 1)
        factor = target / before
        if parametrize.is_parametrized(convolution, "weight"):
            convolution.weight = convolution.weight * factor
        else:
            convolution.weight.mul_(factor)
        self.layers[name] = self._layer(name, before, target, remark)
        if convolution.bias is None:
            return output * factor
        bias = convolution.bias.view(-1, *[1] * (convolution.weight.dim() - 2))
        return (output - bias) * factor + bias

    def _layer(self, name: str, before: float, after: float, remark: str) -> LayerStart:
        return LayerStart(name, _gain(self.convolutions[name]), before, after, remark)

    def all_layers(self) -> Iterator[LayerStart]:
        yield from self.layers.values()
        for name, convolution in self.convolutions.items():
            if name not in self.layers:
                yield LayerStart(name, _gain(convolution), math.nan, math.nan, "never ran")

    def complaints(self) -> Iterator[str]:
        remedies = {
            "never ran": "name an example_input that reaches them, or leave them to their start",
            "constant output": "pass a batch of different inputs, or look at what comes before",
            "output not finite": "look for a division or an overflow before them",
        }
        for remark, remedy in remedies.items():
            names = [layer.name for layer in self.all_layers() if layer.remark == remark]
            if names:
                yield f"warning: {remark}, weight kept: {shorten(names)}; {remedy}"


def _gain(convolution: Convolution) -> float:
    weight = convolution.weight.detach().float()
    return weight.flatten(1).norm(dim=1).median().item()


def _stored_weight(convolution: Any) -> Tensor:
    if parametrize.is_parametrized(convolution, "weight"):
        original: Tensor = next(convolution.parametrizations.weight.parameters())
        return original
    weight: Tensor = convolution.weight
    return weight


def _spread(output: Tensor) -> float:
    """Return the standard deviation over all but dimension 1, the root mean square over that."""
    output = output.detach().double() if output.dtype == torch.float64 else output.detach().float()
    if output.dim() < 2:
        output = output.unsqueeze(1)
    channels = output.transpose(0, 1).flatten(1)
    return channels.var(dim=1, correction=0).mean().sqrt().item()


def _output_spread(output: Any) -> float:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return _spread(leaf)
    return math.nan


def _output_complaints(spread: float) -> Iterator[str]:
    if spread < DEAD:
        yield (
            f"warning: the output starts dead, with a spread of {spread:.1e}: something after the "
            "last convolution shrinks it; look at the initialisation of the classifier"
        )
    elif not spread < EXPLODED:
        yield (
            f"warning: the output explodes at the start, with a spread of {spread:.1e}: lower "
            "branch, or look at the initialisation of the classifier"
        )


def _to_measuring_mode(model: nn.Module) -> None:
    """Switch dropout and noise off, but let the normalisations that stay normalise."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train()


def _run(model: nn.Module, example_input: Any) -> Any:
    try:
        return run_example(model, example_input)
    except Exception as error:
        raise ValueError(
            "model must run on example_input in eval mode, but raised "
            f"{type(error).__name__}: {error}; pass a batch as the model takes it in training"
        ) from error


def _run_training_mode(
    model: nn.Module, example_input: Any, pass_: _Calibration, notes: list[str]
) -> None:
    model.train()
    try:
        with pass_.hooked():
            run_example(model, example_input)
    except Exception as error:
        notes.append(
            "warning: what runs in training mode alone was not measured, as the forward pass "
            f"failed there ({type(error).__name__}: {error})"
        )


@contextmanager
def _undone_on_error(convolutions: dict[str, Convolution]) -> Iterator[None]:
    weights = [_stored for c in convolutions.values() for _stored in _weight_tensors(c)]
    contents = [weight.detach().clone() for weight in weights]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, content in zip(weights, contents, strict=True):
                weight.copy_(content)
        raise


def _weight_tensors(convolution: Any) -> list[Tensor]:
    if parametrize.is_parametrized(convolution, "weight"):
        return list(convolution.parametrizations.weight.parameters())
    return [convolution.weight]


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
    errors = []
    for size in NOISE_SIZES[weight.dim()]:
        space = (size,) * (weight.dim() - 2)
        noise = _image_noise((NOISE_BATCH, stem.in_channels, *space), seed)
        noise = noise.to(weight.device, weight.dtype)
        try:
            with preserved(model):
                _to_measuring_mode(model)
                run_example(model, noise)
            return noise
        except Exception as error:
            errors.append(f"{'x'.join(map(str, noise.shape))}: {type(error).__name__}: {error}")
    raise ValueError(
        f"example_input must be given, as the model does not run on noise ({errors[-1]}); "
        "pass a batch of real inputs"
    )


def _image_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return noise of unit spread with as much power in every octave, as natural images have."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[2]
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(shape)]
    total = torch.zeros(shape)
    for octave in range(1, int(math.log2(size)) + 1):
        coarse = torch.randn(*shape[:2], *[2**octave] * (len(shape) - 2), generator=generator)
        total += F.interpolate(coarse, shape[2:], mode=mode, align_corners=False)
    return total / total.std()


def _branch_ends(
    model: nn.Module, convolutions: dict[str, Convolution], example_input: Any
) -> set[str]:
    """Return the convolutions whose output is added to a shortcut: the ends of residual branches.

    They are read off autograd's graph of a pass over two samples. Of the two operands of a sum,
    the branch is the one with more convolutions on its way from the input.
    """
    nodes: dict[Any, str] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.grad_fn is not None:
                nodes[output.grad_fn] = name

        return hook

    hooks = [c.register_forward_hook(note(name)) for name, c in convolutions.items()]
    try:
        with torch.enable_grad():
            output = _call(model, _differentiable(_first_samples(example_input)))
    except Exception:
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    roots = [
        leaf.grad_fn
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    ]
    order = _topological(roots)
    depths: dict[Any, int] = {}
    for node in order:
        below = [depths[each] for each, _ in node.next_functions if each is not None]
        depths[node] = max(below, default=0) + (node in nodes)
    ends = set()
    for node in order:
        if not _is_sum(node):
            continue
        operands = [each for each, _ in node.next_functions[:2] if each is not None]
        if len(operands) < 2 or depths[operands[0]] == depths[operands[1]]:
            continue
        branch, shortcut = sorted(operands, key=lambda each: depths[each], reverse=True)
        end = _source(branch, nodes)
        if end is not None and not shortcut.name().endswith("AccumulateGrad"):
            ends.add(end)
    return ends


HOMOGENEOUS = (
    "Alias", "AsStrided", "AvgPool", "AdaptiveAvgPool", "Clone", "ConstantPadNd", "Div", "Dropout",
    "Elu", "Expand", "Gelu", "Hardswish", "LeakyRelu", "MaxPool", "MeanBackward", "Mish", "Mul",
    "NativeDropout", "Permute", "Relu", "Reshape", "Silu", "Slice", "Squeeze", "ToCopy",
    "Transpose", "UnsafeView", "Unsqueeze", "Upsample", "View",
)  # fmt: skip
"""Autograd nodes through which the scale of a convolution's output reaches a sum."""


def _source(node: Any, nodes: Mapping[Any, str]) -> str | None:
    """Return the convolution whose output `node` is but for operations that keep its scale."""
    while node not in nodes:
        if not node.name().startswith(HOMOGENEOUS):
            return None
        found = [each for each, _ in node.next_functions if each is not None]
        sources = {_source(each, nodes) for each in found} if len(found) > 1 else set()
        if len(found) != 1:
            sources.discard(None)
            return sources.pop() if len(sources) == 1 else None
        node = found[0]
    return nodes[node]


def _is_sum(node: Any) -> bool:
    name: str = node.name()
    return name.startswith(("AddBackward", "SubBackward")) or "AddRelu" in name


def _topological(roots: list[Any]) -> list[Any]:
    """Return the nodes of autograd's graph, each after those that it is computed from."""
    order: list[Any] = []
    seen = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(each, False) for each, _ in node.next_functions if each is not None]
    return order


def _first_samples(example_input: Any) -> Any:
    tensors = [x for x in tree_leaves(example_input) if isinstance(x, Tensor)]
    lengths = {len(x) if x.dim() else 0 for x in tensors}
    if len(lengths) != 1:
        return example_input
    return tree_map(lambda x: x[:2] if isinstance(x, Tensor) else x, example_input)


def _differentiable(example_input: Any) -> Any:
    def copy(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            # A leaf may not be changed in place; its copy may.
            return x.detach().clone().requires_grad_() * 1
        return x

    return tree_map(copy, example_input)


def _call(model: nn.Module, example_input: Any) -> Any:
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, (tuple, list)):
        return model(*example_input)
    return model(example_input)
