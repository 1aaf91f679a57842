"""convert(): take BatchNorm out of a network, and put zero-mean convolutions in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from czm_fused.dataflow import DataFlow, Value, follow
from czm_fused.groups import check_initialised, decide_stems
from czm_fused.init import (
    CONVOLUTIONS,
    GAIN,
    Convolution,
    check_gain,
    czm_init_,
    named_convolutions,
)
from czm_fused.nn import ChannelAffine, Copy
from czm_fused.text import format_table, shorten

_Module = TypeVar("_Module", bound=nn.Module)

REMOVED, FOLDED, AFFINE, LEFT = "removed", "folded", "affine", "left"
"""What `convert` does with a normalisation."""

OTHER_NORMALISATIONS = (
    _NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)

TIMM_BATCH_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")
"""timm's BatchNorms, whose children `drop` and `act` are applied to their result, in that order."""


@dataclass(frozen=True)
class Change:
    """What `convert` does with one normalisation.

    Attributes:
        name: its dotted name.
        type: the name of its class.
        action: "removed"; "folded" into the convolutions; replaced by an "affine", a scale and
            shift per channel (`czm_fused.nn.ChannelAffine`); or "left" in place.
        convolutions: the dotted names of the convolutions that its input is computed from.
        biases: those of them that gain a bias.
        remark: why, where the action does not say it all.
        copies: the input is needed elsewhere, so the place is taken by `czm_fused.nn.Copy`.
    """

    name: str
    type: str
    action: str
    convolutions: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    remark: str = ""
    copies: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did or, in a dry run, would do; printed, a table.

    Attributes:
        changes: one for every normalisation of the model, in the order of registration.
        stem: the dotted names of the convolutions that are treated as the stem.
        notes: in words, what else was decided, and what could not be seen.
    """

    changes: tuple[Change, ...]
    stem: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def left(self) -> tuple[Change, ...]:
        """The normalisations that stay in place."""
        return tuple(change for change in self.changes if change.action == LEFT)

    def __str__(self) -> str:
        rows = [("normalisation", "type", "action", "convolutions", "remark")]
        for change in self.changes:
            biased = [f"{c} (+ bias)" if c in change.biases else c for c in change.convolutions]
            rows.append((change.name, change.type, change.action, shorten(biased), change.remark))
        return "\n".join([format_table(rows), *self.notes])


def convert(
    model: _Module,
    *,
    example_input: Any = None,
    stem: nn.Module | str | None = None,
    from_pretrained: bool = False,
    dry_run: bool = False,
    gain: float = GAIN,
    generator: torch.Generator | None = None,
) -> tuple[_Module, ConversionReport]:
    """Take BatchNorm out of `model` in place, put CZM in, and return the model and a report.

    A BatchNorm (torch's, SyncBatchNorm, timm's with its activation) goes if what it normalises is
    computed by convolutions, whatever lies between: a concatenation, a sum, an activation, pooling.
    Its place is taken by `nn.Identity`, or by its activation; those convolutions gain a bias; and
    all convolutions of the model, transposed ones excepted, are initialised by CZMI (paper section
    3.2), the stem with its means. Everything else stays, and the report lists every normalisation
    that does. The stem is marked, so that `czm_param_groups(model)` finds it. Make the optimizer
    afterwards, as there are new parameters.

    With `from_pretrained`, the model keeps what it has learnt: the running statistics go into the
    weight and bias of the convolution before,

        W[f] <- W[f] * weight[f] / sqrt(running_var[f] + eps)
        b[f] <- (b[f] - running_mean[f]) * weight[f] / sqrt(running_var[f] + eps) + bias[f]

    where no one else reads the convolution's output. Elsewhere, as in a BatchNorm before the
    convolution, whose activation lies in between, a learnable scale and shift per channel takes
    its place. In eval mode, the outputs stay the same to rounding.

    Args:
        model: the network, on any device; not yet wrapped or compiled.
        example_input: a tensor, a tuple of positional or a dictionary of keyword arguments for
            `model`, one sample of the smallest size that it takes. A forward pass on it, in eval
            and in training mode, shows which convolutions feed which BatchNorm; the model is left
            as it was. If None, `torch.fx` traces the pass, which not every model allows.
        stem: the convolution that reads the image, as a module or by its dotted name; by default
            the first to run.
        from_pretrained: fold BatchNorm instead of starting anew.
        dry_run: print the report, and change nothing.
        gain: the norm of every filter that is initialised, 0.8 by default.
        generator: where the initial weights come from; torch's default generator if None.

    Raises:
        ValueError: `torch.fx` cannot trace `model` and there is no `example_input`, `stem` is not
            a convolution of `model`, `gain` is not a positive number, or a lazy module has not been
            initialised. Nothing has been changed then.
    """
    check_gain(gain)
    check_initialised(model)
    convolutions = named_convolutions(model)
    flow = follow(model, example_input)
    first = convolutions[next(iter(flow.convolutions))] if flow.convolutions else None
    stems, reason = decide_stems(convolutions, stem, first)
    names = tuple(name for name, convolution in convolutions.items() if convolution in stems)
    changes = _Plan(model, convolutions, flow, from_pretrained).changes()
    notes = [
        _summary(changes),
        f"{len(convolutions)} convolutions: "
        + ("weights kept or folded" if from_pretrained else "initialised by CZMI"),
        f"stem: {', '.join(map(repr, names))} ({reason})" if names else f"stem: {reason}",
        *flow.notes,
    ]
    report = ConversionReport(tuple(changes), names, tuple(notes))
    if dry_run:
        print(report)
        return model, report

    _apply(model, changes)
    for convolution in convolutions.values():
        _mark(convolution, convolution in stems)
    if not from_pretrained:
        czm_init_(model, gain=gain, generator=generator)
    return model, report


class _Plan:
    """Decides what becomes of every normalisation of a model."""

    def __init__(
        self,
        model: nn.Module,
        convolutions: dict[str, Convolution],
        flow: DataFlow,
        from_pretrained: bool,
    ) -> None:
        self.modules = dict(model.named_modules())
        self.convolutions = convolutions
        self.flow = flow
        self.from_pretrained = from_pretrained
        holders = Counter(id(p) for m in self.modules.values() for p in m._parameters.values())
        self.shared = {each for each, count in holders.items() if count > 1} - {id(None)}

    def changes(self) -> list[Change]:
        changes = []
        for name, module in self.modules.items():
            if isinstance(module, _BatchNorm):
                changes.append(self._change(name, module))
            elif _is_other_normalisation(module):
                kind = type(module).__name__
                changes.append(Change(name, kind, LEFT, remark="not a BatchNorm"))
        return changes

    def _change(self, name: str, norm: _BatchNorm) -> Change:
        runs = self.flow.norms.get(name, [])
        inputs = [given for given, _ in runs]
        producers = frozenset[str]().union(*(given.producers for given in inputs))
        names = tuple(each for each in self.convolutions if each in producers)
        kind = type(norm).__name__
        why = self._why_left(norm, inputs)
        if why:
            return Change(name, kind, LEFT, names, remark=why)
        biases = tuple(each for each in names if self.convolutions[each].bias is None)
        if self.from_pretrained:
            why = self._why_not_folded(name, inputs, names)
            if why:
                return Change(name, kind, AFFINE, names, remark=why)
            return Change(name, kind, FOLDED, names, biases)
        changed = any(result.changed for _, result in runs)
        changed |= any(getattr(child, "inplace", False) for child in norm.children())
        copies = changed and any(
            not given.is_fresh or given.consumers != {name} for given in inputs
        )
        remark = "a copy of its input is changed in place" if copies else ""
        return Change(name, kind, REMOVED, names, biases, remark, copies)

    def _why_left(self, norm: _BatchNorm, inputs: list[Value]) -> str:
        if not _computes_batch_norm(norm):
            return "a subclass of BatchNorm with a forward pass of its own"
        if not inputs:
            return "did not run"
        if not all(given.producers for given in inputs):
            return "its input comes from no convolution"
        for producer in sorted(frozenset().union(*(given.producers for given in inputs))):
            if producer not in self.convolutions:
                kind = type(self.modules[producer]).__name__
                return f"its input comes from {producer!r}, {_article(kind)} {kind}"
        if self.from_pretrained and norm.running_mean is None:
            return "it keeps no running statistics"
        return ""

    def _why_not_folded(self, name: str, inputs: list[Value], producers: tuple[str, ...]) -> str:
        if not all(given.is_convolution for given in inputs):
            return "no convolution directly before it"
        for producer in producers:
            consumers = {
                each for value in self.flow.convolutions[producer] for each in value.consumers
            }
            if consumers != {name}:
                return f"{producer!r} feeds {shorten(sorted(consumers - {name}))} as well"
            convolution = self.convolutions[producer]
            parameters = {id(each) for each in convolution.parameters(recurse=False)}
            if producer in self.flow.tied or parameters & self.shared:
                return f"the parameters of {producer!r} are shared"
            if not _computes_convolution(convolution):
                return f"{producer!r} does not convolve with its weight as it is"
        return ""


def _computes_batch_norm(norm: _BatchNorm) -> bool:
    kind = type(norm)
    # timm's have an activation as a child. They are known by name, as timm may not be installed.
    if kind.__module__.startswith("timm.") and kind.__name__ in TIMM_BATCH_NORMS:
        return True
    forward = kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return forward and not any(norm.children())


def _computes_convolution(convolution: Convolution) -> bool:
    torchs = next(each for each in CONVOLUTIONS if isinstance(convolution, each))
    return (
        type(convolution).forward is torchs.forward
        and type(convolution)._conv_forward is torchs._conv_forward
        and "weight" in convolution._parameters
    )


def _is_other_normalisation(module: nn.Module) -> bool:
    if isinstance(module, OTHER_NORMALISATIONS):
        return True
    # Other libraries' have no base class in common, but do have names that say what they are.
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _summary(changes: Sequence[Change]) -> str:
    counts = Counter(change.action for change in changes)
    if not counts:
        return "no normalisation was found"
    return "normalisations: " + ", ".join(f"{n} {action}" for action, n in counts.items())


def _article(noun: str) -> str:
    return "an" if noun[:1] in "AEIOU" else "a"


def _apply(model: nn.Module, changes: Iterable[Change]) -> None:
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for change in changes:
        if change.action == LEFT:
            continue
        norm = modules[change.name]
        for name in change.biases:
            _add_bias(modules[name])
        if change.action == FOLDED:
            for name in change.convolutions:
                _fold(modules[name], norm)
        replacements[norm] = _replacement(change, norm)
    for parent in modules.values():
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]


def _mark(convolution: Any, is_stem: bool) -> None:
    """Make a convolution say, as `CZMConv2d(..., stem=True)` does, whether it is the stem."""
    if is_stem or getattr(convolution, "stem", False) is True:
        convolution.stem = is_stem


def _add_bias(convolution: Any) -> None:
    if convolution.bias is None:
        weight = convolution.weight
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        convolution.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _fold(convolution: Any, norm: Any) -> None:
    factor, summand = _scale_and_shift(norm)
    with torch.no_grad():
        weight = convolution.weight
        weight.copy_(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        convolution.bias.copy_(convolution.bias * factor + summand)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return what a BatchNorm in eval mode multiplies each channel by, and then adds to it."""
    with torch.no_grad():
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        factor = (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        summand = -norm.running_mean * factor
        if norm.bias is not None:
            summand = summand + norm.bias
        return factor, summand


def _replacement(change: Change, norm: Any) -> nn.Module:
    parts = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    if change.action == AFFINE:
        factor, summand = (each.to(norm.running_var.dtype) for each in _scale_and_shift(norm))
        affine = ChannelAffine(factor, summand)
        parts.insert(0, affine.requires_grad_(norm.affine and norm.weight.requires_grad))
    elif change.copies:
        parts.insert(0, Copy())
    if not parts:
        return nn.Identity().train(norm.training)
    replacement = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    return replacement.train(norm.training)
