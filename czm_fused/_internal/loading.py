"""A state dictionary that an optimizer loads: checked whole, matched by name, and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from czm_fused._internal import sharding
from czm_fused._internal.text import shorten
from czm_fused.ops.step.spec import STATES, Shape, State
from czm_fused.ops.step.state import check_hyperparameters, fit_state

_REMEDY = "pass what state_dict() of FusedCZMSGD or torch.optim.SGD has returned"


def match_state_dict(state_dict: Any, param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `state_dict` with its parameters in the order of `param_groups`, after checking it.

    Parameters are matched by name where both sides have names, else by their places.

    Raises:
        ValueError: what it holds is of the wrong type or out of its range, or its names are others.
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
    if len(groups) != len(param_groups) or not all(
        len(group.get("param_names", ())) == len(group["params"])
        for group in [*groups, *param_groups]
    ):
        return groups
    numbers = {
        _plain(name): number
        for group in groups
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    names = [[_plain(name) for name in group["param_names"]] for group in param_groups]
    ours = {name for its_names in names for name in its_names}
    if ours != numbers.keys():
        lacks, has = sorted(ours - numbers.keys()), sorted(numbers.keys() - ours)
        raise ValueError(
            "state_dict must be of the parameters that this optimizer has, but "
            + " and ".join(
                [f"lacks {shorten(lacks)}"] * bool(lacks) + [f"has {shorten(has)}"] * bool(has)
            )
            + "; make the optimizer with the names that were saved"
        )
    return [
        {
            **group,
            "params": [numbers[name] for name in its_names],
            "param_names": list(ours_group["param_names"]),
        }
        for group, ours_group, its_names in zip(groups, param_groups, names, strict=True)
    ]


def _plain(name: str) -> str:
    """Return a parameter's name without those that DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


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
