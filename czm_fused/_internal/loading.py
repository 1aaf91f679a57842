"""A state dictionary that an optimizer loads: checked whole, matched by name, and restored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from czm_fused._internal import sharding
from czm_fused._internal.text import shorten
from czm_fused.ops.step.spec import STATES, Shape, State
from czm_fused.ops.step.state import check_hyperparameters, fit_state

_REMEDY = "pass what state_dict() of FusedCZMSGD or torch.optim.SGD has returned"
# What torch.compile and activation checkpointing put into names, before any of their parts.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def match_state_dict(state_dict: Any, param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `state_dict` with its parameters in the order of `param_groups`, after checking it.

    Where both sides have names, parameters are matched by them, and a group takes the options that
    its parameters were saved with; else groups and parameters are matched by their places.

    Raises:
        ValueError: what it holds is of the wrong type or out of its range, its names are others, or
            the parameters of a group were saved with different options.
    """
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        value = state_dict.get(name) if isinstance(state_dict, Mapping) else None
        if not isinstance(value, kind):
            raise ValueError(
                f"state_dict must have {name!r}, but it was a {type(value).__name__}; {_REMEDY}"
            )
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"group {index} of state_dict must be a dictionary with 'params', but was {group!r}"
                f"; {_REMEDY}"
            )
    saved_groups = _in_order_of(state_dict["param_groups"], param_groups)
    # torch refuses what is not as long as the optimizer's.
    for saved, group in zip(saved_groups, param_groups, strict=False):
        check_hyperparameters({**group, **saved})
        for number, param in zip(saved["params"], group["params"], strict=False):
            state = state_dict["state"].get(number, {})
            if not isinstance(state, Mapping):
                raise ValueError(
                    f"the state of parameter {number} must be a dictionary, but was a "
                    f"{type(state).__name__}; {_REMEDY}"
                )
            for spec in STATES:
                if state.get(spec.name) is not None:
                    _check_state(spec, state[spec.name], number, param)
    return {**state_dict, "param_groups": saved_groups}


def _in_order_of(saved: Any, param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = [dict(group) for group in saved]
    for group in groups:
        # torch.distributed.checkpoint gives names for numbers, in our order; param_names are not.
        if any(isinstance(number, str) for number in group["params"]):
            group.pop("param_names", None)
    theirs, ours = ([_names_of(group) for group in each] for each in (groups, param_groups))
    is_named = all(
        len(names) == len(group["params"])
        for names, group in zip([*theirs, *ours], [*groups, *param_groups], strict=True)
    )
    # Names that repeat, as those of two networks may, are told apart by their places alone.
    if not is_named or theirs == ours:
        return groups
    saved_names = _counterparts(list(chain(*ours)), list(chain(*theirs)))
    places = {
        name: (group, number)
        for group, names in zip(groups, theirs, strict=True)
        for name, number in zip(names, group["params"], strict=True)
    }
    empty = iter([group for group in groups if not group["params"]])
    ordered = []
    for index, (present, names) in enumerate(zip(param_groups, ours, strict=True)):
        its_places = [places[saved_names[name]] for name in names]
        sources = [group for group, _ in its_places] or [next(empty, present)]
        _check_options_agree(index, sources)
        numbers = [number for _, number in its_places]
        # Groups that were one share no tensor, which a schedule would change for all of them.
        options = deepcopy(sources[0])
        ordered.append({**options, "params": numbers, "param_names": names})
    return ordered


def _names_of(group: dict[str, Any]) -> list[str]:
    return list(group.get("param_names") or ())


def _counterparts(ours: list[str], theirs: list[str]) -> dict[str, str]:
    """Return by our names the saved ones: the same, else the same but for wrappers.

    Raises:
        ValueError: the names are others, or nothing but wrappers tells some of them apart.
    """
    spellings: tuple[Callable[[str], str], ...] = (str, _plain)
    for spell, spell_theirs in product(spellings, repeat=2):
        our_names = {spell(name): name for name in ours}
        their_names = {spell_theirs(name): name for name in theirs}
        are_unique = len(our_names) == len(ours) and len(their_names) == len(theirs)
        if are_unique and our_names.keys() == their_names.keys():
            return {name: their_names[spell(name)] for name in ours}
    lacks = sorted(our_names.keys() - their_names.keys())
    has = sorted(their_names.keys() - our_names.keys())
    if lacks or has:
        raise ValueError(
            "state_dict must be of the parameters that this optimizer has, but "
            + " and ".join(
                [f"lacks {shorten(lacks)}"] * bool(lacks) + [f"has {shorten(has)}"] * bool(has)
            )
            + "; make the optimizer with the names that were saved"
        )
    counts = Counter(map(_plain, ours)) | Counter(map(_plain, theirs))
    repeated = sorted(name for name, count in counts.items() if count > 1)
    raise ValueError(
        f"param_names must differ without 'module' and {', '.join(map(repr, _WRAPPERS))}, but "
        f"several are {shorten(repeated)}; make the optimizer with the names and in the order that "
        "were saved"
    )


def _plain(name: str) -> str:
    """Return a parameter's name without those of DDP, torch.compile and checkpoint wrappers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts).removeprefix("module.")


def _check_options_agree(index: int, sources: list[dict[str, Any]]) -> None:
    first, *others = {id(source): source for source in sources}.values()
    for other in others:
        for name in {**first, **other}:
            values = first.get(name), other.get(name)
            if name not in ("params", "param_names") and _differ(*values):
                raise ValueError(
                    f"state_dict must have one {name} for all parameters of group {index}, but has "
                    f"{values[0]!r} and {values[1]!r}; make the optimizer with the groups that "
                    "were saved"
                )


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not torch.equal(a, b.to(a.device))
    return bool(a != b)


def _check_state(spec: State, value: object, number: object, param: Tensor) -> None:
    sharding.check_state(spec.name, value, param)
    what = f"{spec.name} of parameter {number}"
    is_count = spec.shape is Shape.SCALAR and isinstance(value, (int, float))
    if is_count:
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must be a tensor, but was a {type(value).__name__}; {_REMEDY}")
    if value.layout != torch.strided or (value.is_complex() and not param.is_complex()):
        raise ValueError(
            f"{what} must be dense and real, but was {value.dtype} and {value.layout}; {_REMEDY}"
        )
    # Momentum of another shape can be deleted until the next step, which refuses it.
    shape = {Shape.SCALAR: (), Shape.FILTERS: () if is_lazy(param) else param.shape[:1]}
    if spec.shape is not Shape.PARAM and not is_lazy(param):
        if tuple(value.shape) != tuple(shape[spec.shape]):
            raise ValueError(
                f"{what} must have shape {tuple(shape[spec.shape])}, but has "
                f"{tuple(value.shape)}; {_REMEDY}"
            )


def restore_state(state: dict[str, Any] | None, saved: dict[str, Any], param: Tensor) -> None:
    """Undo the cast of all state to the parameter's dtype, and give it the parameter's layout."""
    if state is None:
        return
    if state.get("momentum_buffer") is None:
        state.pop("momentum_buffer", None)
    for spec in STATES:
        # The momentum that torch has cast is right; all other state is taken as it was saved.
        value = state.get(spec.name) if spec.dtype is None else saved.get(spec.name)
        if spec.shape is Shape.SCALAR or not isinstance(value, Tensor):
            continue
        if spec.shape is Shape.PARAM and value.shape != param.shape:
            # The next step refuses it; until then it can be deleted.
            continue
        state[spec.name] = fit_state(spec, value, param)
