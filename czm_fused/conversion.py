"""convert(): take BatchNorm out of a network, and put zero-mean convolutions in."""

from __future__ import annotations

import gc
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from czm_fused._internal.convertible import check_convertible, check_untrained
from czm_fused._internal.dataflow import DataFlow, Value, follow
from czm_fused._internal.holders import holders, shared_parameters
from czm_fused._internal.normalisations import computes_batch_norm, is_other_normalisation
from czm_fused._internal.replacement import (
    add_bias,
    computes_convolution,
    fold,
    has_hooks,
    replace_modules,
    replacement_for,
    save_outputs_alone,
    still_called,
)
from czm_fused._internal.text import Tabular, article, shorten
from czm_fused._internal.undo import undone_on_error
from czm_fused.calibration import TARGET, calibrate_
from czm_fused.example import zeros_for
from czm_fused.groups import check_initialised, decide_stems
from czm_fused.init import (
    GAIN,
    Convolution,
    check_positive,
    find_stems,
    init_convolutions_,
    named_convolutions,
)

_Module = TypeVar("_Module", bound=nn.Module)

_logger = logging.getLogger(__name__)

REMOVED, FOLDED, AFFINE, LEFT = "removed", "folded", "affine", "left"
"""The actions that `convert` takes on a normalisation."""


@dataclass(frozen=True)
class Change:
    """The decision about one normalisation.

    Attributes:
        name: its dotted name.
        type: the name of its class, or the operator if it is called as a function.
        action: "removed"; "folded" into the convolutions; replaced by an "affine", a scale and
            shift per channel (`czm_fused.nn.ChannelAffine`); or "left" in place.
        convolutions: the dotted names of the convolutions that its input is computed from.
        biases: those of them that gain a bias.
        remark: the reason, where the action does not say it all.
        copies: the input is needed elsewhere, so the replacement returns a copy of it.
    """

    name: str
    type: str
    action: str
    convolutions: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    remark: str = ""
    copies: bool = False


@dataclass(frozen=True)
class ConversionPlan(Tabular):
    """The changes that `convert` makes to a model; printed, or at the end of a cell, a table.

    Attributes:
        changes: one for every normalisation of the model, in the order of registration.
        stem: the dotted names of the convolutions that are treated as the stem.
        activations: the dotted names of the ReLU6s that become `czm_fused.nn.ReLU6`.
        from_pretrained: weights are kept or folded, instead of initialised anew.
        notes: in words, what else was decided, and what could not be seen.
    """

    changes: tuple[Change, ...]
    stem: tuple[str, ...]
    activations: tuple[str, ...]
    from_pretrained: bool
    notes: tuple[str, ...]

    @property
    def left(self) -> tuple[Change, ...]:
        """The normalisations that stay in place."""
        return tuple(change for change in self.changes if change.action == LEFT)

    @property
    def removed(self) -> tuple[Change, ...]:
        """The BatchNorms that are removed, whose convolutions are initialised anew."""
        return tuple(change for change in self.changes if change.action == REMOVED)

    @property
    def biases(self) -> tuple[str, ...]:
        """The dotted names of the convolutions that gain a bias."""
        return tuple(dict.fromkeys(name for change in self.changes for name in change.biases))

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("normalisation", "type", "action", "convolutions", "remark")
        ]
        for change in self.changes:
            biased = [f"{c} (+ bias)" if c in change.biases else c for c in change.convolutions]
            rows.append((change.name, change.type, change.action, shorten(biased), change.remark))
        return rows


def convert(
    model: _Module,
    *,
    example_input: Any = None,
    stem: nn.Module | str | None = None,
    from_pretrained: bool | None = None,
    gain: float | None = None,
    zero_mean: bool | None = None,
    target: float | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> _Module:
    """Take BatchNorm out of `model` in place, put CZM in, and return `model`.

    A BatchNorm (torch's, SyncBatchNorm, timm's with its activation) goes if its input is computed
    by convolutions, with anything in between: a concatenation, a sum, an activation, pooling. It is
    replaced by `nn.Identity`, or by its activation; those convolutions gain a bias, are initialised
    as by `czm_init_`, with filters of any mean, and scaled by `czm_fused.calibration.calibrate_` so
    that the output of each starts with the same spread. `nn.ReLU6` becomes `czm_fused.nn.ReLU6`,
    which keeps less for backward, unless its result is changed in place. Everything else stays: a
    warning names every normalisation that does, and `plan_conversion` lists the reasons. The stem
    is marked, so that `czm_param_groups(model)` finds it. Make optimizers and averaged copies of
    the model afterwards, as parameters are added and removed. While the model is trained,
    `czm_fused.center_` takes away what BatchNorm took from the means.

    A model with no BatchNorm to remove, as one that is converted already, keeps its weights, and a
    warning says so; `czm_init_` initialises those of a network without BatchNorm.

    With `from_pretrained`, the model keeps what it has learnt: the running statistics are folded
    into the weight and bias of the convolution before,

        W[f] <- W[f] * weight[f] / sqrt(running_var[f] + eps)
        b[f] <- (b[f] - running_mean[f]) * weight[f] / sqrt(running_var[f] + eps) + bias[f]

    if nothing else reads the convolution's output. Elsewhere, as with a BatchNorm that follows an
    activation, a learnable scale and shift per channel takes its place. In eval mode, the outputs
    stay the same to rounding.

    The plan, and the start of each layer, are logged by `logging` at level INFO.

    Args:
        model: the network, on any device; not yet compiled, wrapped or sharded.
        example_input: a batch of real inputs, 16 or more: a tensor, a tuple of positional or a
            dictionary of keyword arguments for `model`. Forward passes on it, in eval and in
            training mode, show which convolutions feed which BatchNorm, and set the scales. If
            None, zeros and noise of a usual size take its place.
        stem: the convolution that reads the image, as a module or by its dotted name; by default
            the first to run.
        from_pretrained: True folds BatchNorm, False starts anew. By default False; but a model
            with running statistics that are not their initial values, as after training, is then
            refused, as it would lose its weights.
        gain: the norm of every filter of every convolution, in place of the measured scales; the
            paper's is 0.8.
        zero_mean: whether spatial slices start with mean 0, as in the paper. By default True with
            `gain` and False without. The stem and depthwise filters keep their means.
        target: the measured scales give the output of every convolution this spread, as in
            `calibrate_`; by default 1. Networks with squeeze-and-excitation want 0.3, which keeps
            their gates where they are nearly linear. Not with `gain`.
        noise: half the width a of the noise U(1 - a, 1 + a) that multiplies each channel of each
            sample where a BatchNorm was replaced, in training only (`czm_fused.nn.ChannelNoise`);
            in [0, 1), 0 (none) by default.
        generator: the source of the initial weights; torch's default generator if None.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: as in `plan_conversion`, `czm_init_` and `calibrate_`; `gain`, `zero_mean` or
            `target` is given with `from_pretrained`, or `gain` with `target`; or `noise` is outside
            [0, 1). The model is as it was.

    Warns:
        UserWarning: a normalisation stays, there is no BatchNorm to remove, the forward pass fails
            in training mode, an optimizer that was made before will not train the new parameters,
            or as in `calibrate_`.
    """
    if gain is not None:
        check_positive("gain", gain)
    if target is not None:
        check_positive("target", target)
        if gain is not None:
            raise ValueError(
                f"target must be None with gain, which measures no scales, but was {target}"
            )
    if not 0.0 <= noise < 1.0:
        raise ValueError(f"noise must be in [0, 1), but was {noise}")
    plan = plan_conversion(
        model, example_input=example_input, stem=stem, from_pretrained=from_pretrained
    )
    for name, value in (("gain", gain), ("zero_mean", zero_mean), ("target", target)):
        if plan.from_pretrained and value is not None:
            raise ValueError(
                f"{name} must be None with from_pretrained, which keeps weights, but was {value}"
            )
    if zero_mean is None:
        zero_mean = gain is not None
    convolutions = named_convolutions(model)
    _warn_of_optimizers(model, plan)
    with undone_on_error(model, convolutions.values()):
        _carry_out(model, plan, noise, example_input)
        if plan.removed:
            if gain is None:
                convolutions = _followed(plan, convolutions)
            stems = [convolutions[name] for name in plan.stem if name in convolutions]
            init_convolutions_(convolutions, stems, gain or GAIN, zero_mean, generator)
            if gain is None:
                report = calibrate_(
                    model,
                    example_input,
                    target=TARGET if target is None else target,
                    weigh_taps=not zero_mean,
                    only=convolutions,
                )
                _logger.info("%s", report)
    _logger.info("%s", plan)
    _warn_of_plan(plan)
    return model


def plan_conversion(
    model: nn.Module,
    *,
    example_input: Any = None,
    stem: nn.Module | str | None = None,
    from_pretrained: bool | None = None,
) -> ConversionPlan:
    """Return the changes that `convert` would make to `model`, and leave it as it is.

    Args:
        model: as in `convert`.
        example_input: as in `convert`; one sample is enough here.
        stem: as in `convert`.
        from_pretrained: as in `convert`.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `model` is compiled, wrapped, sharded, scripted or exported, has a lazy module
            that has not been initialised, has running statistics of a training while
            `from_pretrained` is None, or does not run on `example_input` in eval mode; there is no
            `example_input`, and the model does not run on zeros; or `stem` is not a convolution of
            `model`.
    """
    check_convertible(model)
    check_initialised(model)
    if from_pretrained is None:
        check_untrained(model)
        from_pretrained = False
    convolutions = named_convolutions(model)
    if stem is not None:
        find_stems(convolutions, stem)
    if not convolutions:
        flow = DataFlow()
    elif example_input is None:
        flow = follow(model, zeros_for(model, next(iter(convolutions.values()))))
    else:
        flow = follow(model, example_input)
    first = convolutions[next(iter(flow.convolutions))] if flow.convolutions else None
    stems, reason = decide_stems(convolutions, stem, first)
    names = tuple(name for name, convolution in convolutions.items() if convolution in stems)
    planner = _Planner(model, convolutions, flow, from_pretrained)
    changes, activations = planner.changes(), planner.activations()
    removes = any(change.action == REMOVED for change in changes)
    notes = [
        _summary(changes),
        f"{len(convolutions)} convolutions: "
        + ("initialised anew" if removes else "weights kept or folded"),
        f"stem: {', '.join(map(repr, names))} ({reason})" if names else f"stem: {reason}",
        *flow.notes,
    ]
    plan = ConversionPlan(tuple(changes), names, activations, from_pretrained, tuple(notes))
    if not plan.biases:
        return plan
    note = f"{len(plan.biases)} convolutions gain a bias: make the optimizer after the conversion"
    return replace(plan, notes=(*notes, note))


class _Planner:
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
        self.shared = shared_parameters(model)

    def changes(self) -> list[Change]:
        changes = []
        for name, module in self.modules.items():
            if isinstance(module, _BatchNorm):
                changes.append(self._change(name, module))
            elif "parametrizations" in name.split("."):
                # weight_norm and its like normalise weights.
                continue
            elif is_other_normalisation(module):
                kind = type(module).__name__
                changes.append(Change(name, kind, LEFT, remark="not a BatchNorm of torch or timm"))
        listed = {change.name for change in changes}
        for name, operators in self.flow.functional.items():
            if name not in listed:
                remark = "called as a function, not as a module"
                changes.append(Change(name, shorten(sorted(operators)), LEFT, remark=remark))
        return changes

    def activations(self) -> tuple[str, ...]:
        """Return the names of the ReLU6s whose results stay as they are, which backward needs."""
        return tuple(
            name
            for name, values in self.flow.activations.items()
            if type(self.modules[name]) is nn.ReLU6
            and not has_hooks(self.modules[name])
            and not any(value.changed for value in values)
        )

    def _change(self, name: str, norm: _BatchNorm) -> Change:
        runs = self.flow.norms.get(name, [])
        inputs = [given for given, _ in runs]
        producers = frozenset[str]().union(*(given.producers for given in inputs))
        names = tuple(each for each in self.convolutions if each in producers)
        kind = type(norm).__name__
        why = self._why_left(name, norm, inputs)
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

    def _why_left(self, name: str, norm: _BatchNorm, inputs: list[Value]) -> str:
        if parametrize.is_parametrized(norm):
            return "it is parametrized"
        if not computes_batch_norm(norm):
            return "a subclass of BatchNorm with a forward pass of its own"
        if has_hooks(norm):
            return "it has hooks"
        if name in self.flow.reads:
            attributes = shorten(sorted(self.flow.reads[name])) or "tensors"
            return f"the forward pass reads its {attributes} elsewhere"
        if not inputs:
            return "did not run"
        if not all(given.producers for given in inputs):
            return "its input comes from no convolution"
        for producer in sorted(frozenset().union(*(given.producers for given in inputs))):
            if producer not in self.convolutions:
                kind = type(self.modules[producer]).__name__
                if not producer:
                    return "its input comes from a weight of the model itself"
                return f"its input comes from {producer!r}, {article(kind)} {kind}"
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
            if has_hooks(convolution):
                return f"{producer!r} has hooks"
            parameters = {id(each) for each in convolution.parameters(recurse=False)}
            if producer in self.flow.tied or parameters & self.shared:
                return f"the parameters of {producer!r} are shared"
            if not computes_convolution(convolution):
                return f"{producer!r} does not convolve with its parameters as they are"
        return ""


def _warn_of_plan(plan: ConversionPlan) -> None:
    for note in plan.notes:
        if "in training mode alone" in note:
            warnings.warn(note, stacklevel=3)
    if not plan.from_pretrained and not plan.removed:
        warnings.warn(
            "no BatchNorm of model is removed, so its weights stay as they were; "
            "czm_init_(model, example_input=...) initialises a network without BatchNorm",
            stacklevel=3,
        )
    if plan.left:
        reasons = [f"{change.name!r} ({change.type}: {change.remark})" for change in plan.left]
        warnings.warn(
            f"{len(plan.left)} of {len(plan.changes)} normalisations stay: {shorten(reasons)}; "
            "plan_conversion(model) lists them all",
            stacklevel=3,
        )


def _warn_of_optimizers(model: nn.Module, plan: ConversionPlan) -> None:
    """Warn of optimizers, groups and wrappers that exist and lack the parameters to come."""
    affine = any(change.action == AFFINE for change in plan.changes)
    if not plan.biases and not affine:
        return
    parameters = {id(parameter) for parameter in model.parameters()}
    if not holders(parameters):
        return
    # Garbage in reference cycles holds parameters, too.
    gc.collect()
    names = holders(parameters)
    if names:
        warnings.warn(
            f"{shorten(names)} made before convert will not train the parameters that it adds; "
            "make it from the converted model",
            stacklevel=3,
        )


def _summary(changes: Sequence[Change]) -> str:
    counts = Counter(change.action for change in changes)
    if not counts:
        return "no normalisation was found"
    return "normalisations: " + ", ".join(f"{n} {action}" for action, n in counts.items())


def _followed(plan: ConversionPlan, convolutions: dict[str, Convolution]) -> dict[str, Convolution]:
    """Return the convolutions that a removed BatchNorm followed."""
    # The others, as in squeeze-and-excitation, start well without one; with the spread that suits
    # the rest, they would drive the sigmoid behind them to its ends.
    fed = {name for each in plan.removed for name in each.convolutions}
    return {name: each for name, each in convolutions.items() if name in fed}


def _carry_out(model: nn.Module, plan: ConversionPlan, noise: float, example_input: Any) -> None:
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for change in plan.changes:
        if change.action == LEFT:
            continue
        norm = modules[change.name]
        for name in change.biases:
            add_bias(modules[name])
        if change.action == FOLDED:
            for name in change.convolutions:
                fold(modules[name], norm)
        replacements[norm] = replacement_for(
            norm, affine=change.action == AFFINE, copies=change.copies, noise=noise
        )
    replace_modules(model, replacements)
    norms = {name: module for name, module in modules.items() if module in replacements}
    _check_gone(model, norms, example_input)
    save_outputs_alone(model, [modules[name] for name in plan.activations])
    for name, convolution in named_convolutions(model).items():
        _mark(convolution, name in plan.stem)


def _check_gone(model: nn.Module, norms: dict[str, nn.Module], example_input: Any) -> None:
    """Raise a ValueError if the model's forward pass still calls one of the replaced `norms`."""
    names = still_called(model, norms, example_input)
    if names:
        raise ValueError(
            f"model must reach its BatchNorm {names[0]!r} as a child of a module, but does it in "
            "another way too, as through a list or a dict; use nn.ModuleList or nn.ModuleDict"
        )


def _mark(convolution: Any, is_stem: bool) -> None:
    """Make a convolution say, as `CZMConv2d(..., stem=True)` does, whether it is the stem."""
    if is_stem or getattr(convolution, "stem", False) is True:
        convolution.stem = is_stem
