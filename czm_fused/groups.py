"""Parameter groups: which parameters of a model are filters, and what the method does to each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from czm_fused._internal.parameters import level_of_caller
from czm_fused._internal.text import Tabular, shorten
from czm_fused.example import hooked, preserved, run_example
from czm_fused.init import Convolution, check_module, find_stems, is_depthwise, named_convolutions
from czm_fused.nn import ExpScale
from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES

# LUMA may anchor the rows of linear layers, but never a transposed convolution.
_PLAIN = {"exp_scale": False, "zmg": 0.0, "luma": 0.0, "grad_norm": 0.0, "max_filter_dim": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "stem": {"exp_scale": True, "zmg": 0.0},
    "spatial": {"exp_scale": True},
    # The mean of a depthwise filter is all that it passes of its channel's level.
    "depthwise": {"exp_scale": True, "zmg": 0.0},
    # A slice of one tap is its own mean; to remove it would remove the whole gradient.
    "pointwise": {"exp_scale": True, "zmg": 0.0},
    "rest": _PLAIN,
    "bias": _PLAIN,
}
"""The settings of each group; the optimizer's defaults hold for everything else."""

HYPERPARAMETERS = (*HYPERPARAMETER_NAMES, "exp_scale", "master_weights", "capturable")
"""The settings that a group of `FusedCZMSGD` can have."""


class ParamGroup(dict[str, Any]):
    """One parameter group; printed, without the values of its parameters."""

    def __repr__(self) -> str:
        settings = {key: value for key, value in self.items() if key not in _NOT_SETTINGS}
        return (
            f"{type(self).__name__}({self.get('name')!r}: {len(self.get('params', ()))} parameters"
            f", {_weights(self):,} weights, {settings})"
        )

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Do as `dict.setdefault`, which every optimizer calls for each of its own settings.

        Warns:
            UserWarning: the setting is none of `FusedCZMSGD`'s, so that an optimizer has been given
                the group that ignores `exp_scale`, `zmg`, `luma` and `grad_norm`.
        """
        if key not in self and not key.startswith("initial_") and key not in _KNOWN:
            warnings.warn(
                "the groups of czm_param_groups must go to FusedCZMSGD, but another optimizer got "
                "them, which ignores their exp_scale, zmg, luma and grad_norm; use FusedCZMSGD, or "
                "pass plain groups, [dict(group) for group in groups]",
                stacklevel=level_of_caller(),
            )
        return super().setdefault(key, default)


_NOT_SETTINGS = ("name", "params", "param_names")
_KNOWN = (*HYPERPARAMETERS, *_NOT_SETTINGS, "differentiable", "min_filter_dim", "max_filter_dim")


class ParamGroups(Tabular, list[dict[str, Any]]):
    """Group dictionaries for `FusedCZMSGD`; printed, or shown by a notebook, a table.

    Attributes:
        notes: in words, what was decided and why.
    """

    _right_aligned = (1, 2)

    def __init__(self, groups: Iterable[dict[str, Any]], notes: Iterable[str] = ()) -> None:
        super().__init__(ParamGroup(group) for group in groups)
        self.notes = tuple(notes)

    def copy(self) -> ParamGroups:
        """Return groups of the same parameters whose settings can be changed independently."""
        copies = [{**group, "params": list(group["params"])} for group in self]
        return ParamGroups(copies, self.notes)

    __copy__ = copy

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("group", "parameters", "weights", "settings", "names")]
        return rows + [_describe(group) for group in self]

    __repr__ = Tabular.__str__


def czm_param_groups(
    model: nn.Module,
    *,
    stem: nn.Module | str | None = None,
    example_input: Any = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParamGroups:
    """Sort the parameters of `model` into the groups that the method treats differently.

    - `stem`: the filters that read the image: exp-scaled and anchored, but their gradient keeps its
      mean (zmg 0).
    - `spatial`: the filters with more than one tap: everything (paper sections 3.1 to 3.4).
    - `depthwise`: those of them that read one channel of several (`groups == in_channels`):
      exp-scaled and anchored, but their gradient keeps its mean.
    - `pointwise`: the filters with one tap: exp-scaled and anchored; they have no spatial mean.
    - `rest`: biases, linear layers, normalisations, transposed and complex convolutions, the
      parameters of `exp_scale(conv)`, and all else: plain momentum SGD.
    - `bias`: the biases of convolutions, if `overrides` sets something for them, as a rate of
      their own; plain momentum SGD, too.

    Every parameter is in exactly one group, frozen ones included, as they may be unfrozen. The
    modules decide: position embeddings, class tokens, `nn.Bilinear` and stacked ensembles are among
    the rest, whatever their number of dimensions. Groups without parameters are left out. The
    groups belong to the caller, and no optimizer of this package writes to them.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> [group["name"] for group in czm_param_groups(network)]
        ['stem', 'spatial', 'rest']

    Args:
        model: the network.
        stem: the convolution that reads the image, as a module or by its dotted name.
        example_input: without `stem`: a tensor, a tuple of positional or a dictionary of keyword
            arguments for `model`; the first convolution to run on it is the stem. The pass ends
            there, in eval mode and without gradients, and leaves modes and generators as they were.
            Without either, the convolutions built with `CZMConv*(..., stem=True)` are the stem,
            else the first in the order of registration.
        overrides: settings by group name, such as `{"rest": {"lr": 0.1, "luma": 5e-4}}`; there,
            `luma` anchors the rows of the linear layers. Other settings stay.

    Returns:
        A list of dictionaries with the keys `name`, `params`, `param_names` and the settings. A
        group added later to the same optimizer must have `param_names`, too, as torch demands.

    Raises:
        TypeError: `model` is not an `nn.Module` (parameters alone do not tell which are filters),
            or `overrides` is not a dictionary of dictionaries.
        ValueError: `stem` is not a convolution of `model`, no convolution runs on `example_input`,
            `overrides` names an unknown group or hyperparameter, a lazy module has not been
            initialised, or `model` is scripted, traced, exported or flattened by FSDP1.

    Warns:
        UserWarning: the model still has BatchNorms, or a hook or parametrization computes the
            weight of a convolution, which is then trained by plain momentum SGD.
    """
    check_module(model)
    _check_not_flattened(model)
    overrides = {} if overrides is None else overrides
    _check_overrides(overrides)
    check_initialised(model)
    convolutions = named_convolutions(model)
    first = None
    if stem is None and convolutions and example_input is not None:
        first = _first_to_run(model, convolutions, example_input)
    stems, reason = decide_stems(convolutions, stem, first)

    roles: dict[Tensor, str] = {}
    complexes: list[str] = []
    for name, convolution in convolutions.items():
        # A parametrized weight is no parameter; what it is computed from is among the rest.
        weight = convolution._parameters.get("weight")
        if weight is None or roles.get(weight) == "stem":
            continue
        if weight.is_complex():
            complexes.append(name)
        elif any(convolution is each for each in stems):
            roles[weight] = "stem"
        else:
            roles[weight] = _role(convolution, weight)
    if "bias" in overrides:
        biases = (each._parameters.get("bias") for each in convolutions.values())
        roles.update((bias, "bias") for bias in biases if bias is not None)

    members: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in SETTINGS}
    for name, parameter in model.named_parameters():
        members[roles.get(parameter, "rest")].append((name, parameter))
    groups = [
        {
            "name": group,
            "params": [parameter for _, parameter in named],
            "param_names": [name for name, _ in named],
            **SETTINGS[group],
            **overrides.get(group, {}),
        }
        for group, named in members.items()
        if named
    ]
    names = [name for name, convolution in convolutions.items() if convolution in stems]
    notes = [f"stem: {', '.join(map(repr, names))} ({reason})" if names else f"stem: {reason}"]
    transposed = [n for n, module in model.named_modules() if isinstance(module, _ConvTransposeNd)]
    if transposed:
        notes.append(
            f"rest: holds the transposed convolutions {shorten(transposed)}, whose filters are not "
            "along dimension 0"
        )
    if complexes:
        notes.append(
            f"rest: holds the complex convolutions {shorten(complexes)}, as filters must be real"
        )
    complaints = list(_complaints(model, convolutions))
    for complaint in complaints:
        warnings.warn(complaint, stacklevel=2)
    return ParamGroups(groups, [*notes, *complaints])


def _role(convolution: Convolution, weight: Tensor) -> str:
    if weight.shape[2:].numel() == 1:
        return "pointwise"
    return "depthwise" if is_depthwise(convolution) else "spatial"


def _complaints(model: nn.Module, convolutions: Mapping[str, Convolution]) -> Iterator[str]:
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if norms:
        yield (
            f"model still has BatchNorms, {shorten(norms)}: call convert(model) first, as the "
            "method replaces them"
        )
    computed = [name for name, c in convolutions.items() if _is_computed(c)]
    if computed:
        yield (
            f"the weights of {shorten(computed)} are computed from other parameters, by pruning or "
            "a normalisation of weights: those are trained by plain momentum SGD; remove it to "
            "have them trained as filters"
        )


def _is_computed(convolution: Any) -> bool:
    """Return True if a hook or a parametrization other than `exp_scale` computes the weight."""
    if parametrize.is_parametrized(convolution, "weight"):
        return not isinstance(convolution.parametrizations.weight[0], ExpScale)
    return "weight" not in convolution._parameters


def _check_not_flattened(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                "model must keep the shapes of its parameters, but FullyShardedDataParallel "
                "flattens them; shard it with torch.distributed.fsdp.fully_shard instead"
            )


def _check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    example = '{"rest": {"lr": 0.1}}'
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dictionary such as {example}, but was {overrides!r}")
    for group, settings in overrides.items():
        if group not in SETTINGS:
            raise ValueError(
                f"overrides must name groups among {', '.join(SETTINGS)}; but named {group!r}"
            )
        if not isinstance(settings, Mapping):
            raise TypeError(
                f"overrides[{group!r}] must be a dictionary of settings, but was {settings!r}; "
                f"write {example.replace('rest', group).replace('0.1', _number(settings))}"
            )
        for name in settings:
            if name not in HYPERPARAMETERS:
                raise ValueError(
                    f"overrides[{group!r}] must set hyperparameters among "
                    f"{', '.join(HYPERPARAMETERS)}; but set {name!r}"
                )


def _number(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float)) else "0.1"


def check_initialised(model: nn.Module) -> None:
    """Raise a ValueError if a lazy module of `model` has not been initialised."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ValueError(
                f"the {kind} {name!r} of a lazy module has no shape yet; run a forward pass first"
            )


def decide_stems(
    convolutions: dict[str, Convolution],
    stem: nn.Module | str | None,
    first_to_run: nn.Module | None,
) -> tuple[tuple[nn.Module, ...], str]:
    """Return the stems among `convolutions`, and in words why it is those.

    Args:
        convolutions: the convolutions of a model by their dotted names.
        stem: the stem as the caller named it, if at all.
        first_to_run: the convolution that is known to run first, if any is.

    Raises:
        ValueError: `stem` is none of `convolutions`.
    """
    if stem is not None:
        return find_stems(convolutions, stem), "named by the caller"
    if not convolutions:
        return (), "none, as the model has no convolution"
    if first_to_run is not None:
        return (first_to_run,), "the first to run"
    flagged = find_stems(convolutions, None)
    if flagged:
        return flagged, "built with stem=True"
    return (next(iter(convolutions.values())),), "the first in the order of registration"


class _Reached(Exception):
    """Ends a forward pass at the convolution that it has reached."""


def _first_to_run(
    model: nn.Module, convolutions: dict[str, Convolution], example_input: Any
) -> nn.Module:
    reached: list[nn.Module] = []

    def stop(module: nn.Module, _: Any) -> None:
        reached.append(module)
        raise _Reached

    hooks = [each.register_forward_pre_hook(stop) for each in convolutions.values()]
    with hooked(hooks), suppress(_Reached), preserved(model):
        run_example(model.eval(), example_input)
    if not reached:
        raise ValueError(
            "example_input must reach a convolution of the model, but none ran on it; "
            "name the stem with stem=..."
        )
    return reached[0]


def _weights(group: Mapping[str, Any]) -> int:
    # Optimizers accept generators and single tensors, but store lists.
    return sum(parameter.numel() for parameter in group.get("params", ()))


def _describe(group: Mapping[str, Any]) -> tuple[str, ...]:
    settings = ", ".join(f"{key}={group[key]}" for key in HYPERPARAMETERS if key in group)
    return (
        str(group.get("name", "")),
        str(len(group["params"])),
        f"{_weights(group):,}",
        settings,
        shorten(group.get("param_names", [])),
    )
