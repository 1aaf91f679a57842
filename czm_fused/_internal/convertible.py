"""Refuse models that cannot be converted, before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from czm_fused._internal.sharding import check_not_sharded
from czm_fused.init import check_module

WRAPPERS = {
    "OptimizedModule": "compiled; call torch.compile(convert(model)) instead",
    "DistributedDataParallel": "wrapped; call DistributedDataParallel(convert(model)) instead",
    "DataParallel": "wrapped; call DataParallel(convert(model)) instead",
    "FullyShardedDataParallel": "sharded; convert it before it is sharded",
}
"""Classes of modules that cannot be converted any more, and the remedies."""


def check_convertible(model: Any) -> None:
    """Raise a TypeError or a ValueError if `model` is not a module whose layers can be replaced."""
    check_module(model)
    check_not_sharded(model)
    for name, module in model.named_modules():
        what = f"model must be a plain module, but {'its module ' + repr(name) if name else 'it'}"
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS:
                raise ValueError(f"{what} is {WRAPPERS[kind.__name__]}")
        if module._compiled_call_impl is not None:
            raise ValueError(f"{what} is compiled; call convert(model) before model.compile()")


def check_untrained(model: nn.Module) -> None:
    """Raise a ValueError if `model` has running statistics that are not their initial values."""
    for name, module in model.named_modules():
        for key, initial in (("running_mean", 0), ("running_var", 1)):
            statistics = module._buffers.get(key)
            if statistics is None or statistics.is_meta or not (statistics != initial).any():
                continue
            raise ValueError(
                "from_pretrained must be given for a model that was trained, but was None while "
                f"{key} of {name!r} is not {initial}; pass True to keep what the model has learnt, "
                "or False to start anew"
            )
