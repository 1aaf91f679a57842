"""Parameter groups: which parameters of a model are filters, and what the method does to each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from czm_fused.init import find_stems, named_convolutions

SETTINGS: dict[str, dict[str, Any]] = {
    "stem": {"exp_scale": True, "zmg": 0.0},
    "spatial": {"exp_scale": True},
    # A slice of one tap is its own mean: there is nothing to remove but the gradient itself.
    "pointwise": {"exp_scale": True, "zmg": 0.0},
    "rest": {"exp_scale": False, "zmg": 0.0, "luma": 0.0},
}
"""What each group sets; the optimizer's defaults hold for everything else."""

HYPER_PARAMETERS = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "zmg", "luma", "exp_scale"
)  # fmt: skip
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
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = (
                cell.rjust(width) if column in (1, 2) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self.notes])


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
    _check_initialised(model)
    convolutions = named_convolutions(model)
    stems, reason = _decide_stems(model, convolutions, stem, example_input)

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
            f"rest: holds the transposed convolutions {_shorten(transposed)}, whose filters do not "
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


def _check_initialised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"the parameter {name!r} of a lazy module has no shape yet: run a forward pass first"
            )


def _decide_stems(
    model: nn.Module,
    convolutions: dict[str, nn.Module],
    stem: nn.Module | str | None,
    example_input: Any,
) -> tuple[tuple[nn.Module, ...], str]:
    if stem is not None:
        return find_stems(convolutions, stem), "named by the caller"
    if not convolutions:
        return (), "none, as the model has no convolution"
    if example_input is not None:
        return (_first_to_run(model, convolutions, example_input),), "the first to run"
    flagged = find_stems(convolutions, None)
    if flagged:
        return flagged, "built with stem=True"
    return (next(iter(convolutions.values())),), "the first in the order of registration"


class _Reached(Exception):
    """Ends a forward pass at the convolution that it has reached."""


def _first_to_run(
    model: nn.Module, convolutions: dict[str, nn.Module], example_input: Any
) -> nn.Module:
    reached: list[nn.Module] = []

    def stop(module: nn.Module, _: Any) -> None:
        reached.append(module)
        raise _Reached

    args, kwargs = (example_input,), {}
    if isinstance(example_input, Mapping):
        args, kwargs = (), dict(example_input)
    elif isinstance(example_input, (tuple, list)):
        args = tuple(example_input)
    modes = {module: module.training for module in model.modules()}
    hooks = [each.register_forward_pre_hook(stop) for each in convolutions.values()]
    accelerators = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    device_type = next(iter(accelerators)).type if accelerators else "cuda"
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=device_type):
            model(*args, **kwargs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not reached:
        raise ValueError(
            "example_input must reach a convolution of the model, but none ran on it; name the stem "
            "with stem=..."
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
        _shorten(group["param_names"]),
    )


def _shorten(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")
