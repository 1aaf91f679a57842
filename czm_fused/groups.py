"""Parameter groups: which parameters of a model are filters, and what the method does to each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from czm_fused._internal.text import format_table, shorten
from czm_fused.example import preserved, run_example
from czm_fused.init import Convolution, find_stems, named_convolutions

SETTINGS: dict[str, dict[str, Any]] = {
    "stem": {"exp_scale": True, "zmg": 0.0},
    "spatial": {"exp_scale": True},
    # A slice of one tap is its own mean: there is nothing to remove but the gradient itself.
    "pointwise": {"exp_scale": True, "zmg": 0.0},
    # Anchored, if at all, are the rows of linear layers, and never a transposed convolution.
    "rest": {"exp_scale": False, "zmg": 0.0, "luma": 0.0, "max_filter_dim": 2},
}
"""What each group sets; the optimizer's defaults hold for everything else."""

HYPER_PARAMETERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "zmg",
    "luma",
    "exp_scale",
    "master_weights",
    "capturable",
)
"""What a group of `FusedCZMSGD` can set."""


class ParamGroups(list[dict[str, Any]]):
    """Group dictionaries for `FusedCZMSGD` or any torch optimizer; printed, a table.

    Attributes:
        notes: in words, what was decided and why.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], notes: Iterable[str] = ()) -> None:
        super().__init__(groups)
        self.notes = tuple(notes)

    def __str__(self) -> str:
        rows = [("group", "parameters", "weights", "settings", "names")]
        rows += [_describe(group) for group in self]
        return "\n".join([format_table(rows, right_aligned=(1, 2)), *self.notes])


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
    - `pointwise`: the filters with one tap: exp-scaled and anchored; they have no spatial mean.
    - `rest`: biases, linear layers, normalisations, transposed convolutions, the parameters of
      `exp_scale(conv)`, and all else: plain momentum SGD.

    Every parameter is in exactly one group, frozen ones included, as they may be unfrozen. Groups
    without parameters are left out. `print(groups)` shows what was decided.

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
        ValueError: `stem` is not a convolution of `model`, no convolution runs on `example_input`,
            `overrides` names an unknown group or hyper-parameter, or a lazy module has not been
            initialised.
    """
    overrides = overrides or {}
    _check_overrides(overrides)
    check_initialised(model)
    convolutions = named_convolutions(model)
    first = None
    if stem is None and convolutions and example_input is not None:
        first = _first_to_run(model, convolutions, example_input)
    stems, reason = decide_stems(convolutions, stem, first)

    roles: dict[Tensor, str] = {}
    for convolution in convolutions.values():
        # A parametrized weight is no parameter; what it is computed from is among the rest.
        weight = convolution._parameters.get("weight")
        if weight is None or roles.get(weight) == "stem":
            continue
        if any(convolution is each for each in stems):
            roles[weight] = "stem"
        else:
            roles[weight] = "spatial" if weight.shape[2:].numel() > 1 else "pointwise"

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
            f"rest: holds the transposed convolutions {shorten(transposed)}, whose filters do not "
            "lie along dimension 0"
        )
    return ParamGroups(groups, notes)


def _check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    for group, settings in overrides.items():
        if group not in SETTINGS:
            raise ValueError(
                f"overrides must name groups among {', '.join(SETTINGS)}; but named {group!r}"
            )
        for name in settings:
            if name not in HYPER_PARAMETERS:
                raise ValueError(
                    f"overrides[{group!r}] must set hyper-parameters among "
                    f"{', '.join(HYPER_PARAMETERS)}; but set {name!r}"
                )


def check_initialised(model: nn.Module) -> None:
    """Raise a ValueError if a lazy module of `model` has not been initialised."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"the parameter {name!r} of a lazy module has no shape yet: "
                "run a forward pass first"
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
    try:
        with preserved(model):
            run_example(model.eval(), example_input)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not reached:
        raise ValueError(
            "example_input must reach a convolution of the model, but none ran on it; "
            "name the stem with stem=..."
        )
    return reached[0]


def _describe(group: dict[str, Any]) -> tuple[str, str, str, str, str]:
    settings = ", ".join(f"{key}={group[key]}" for key in HYPER_PARAMETERS if key in group)
    weights = sum(parameter.numel() for parameter in group["params"])
    return (
        group["name"],
        str(len(group["params"])),
        f"{weights:,}",
        settings,
        shorten(group["param_names"]),
    )
