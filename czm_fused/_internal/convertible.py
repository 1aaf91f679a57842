"""Refuse models that cannot be converted, before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from czm_fused._internal.text import article
from czm_fused.init import Convolution

WRAPPERS = {
    "OptimizedModule": "compiled; call torch.compile(convert(model)) instead",
    "DistributedDataParallel": "wrapped; call DistributedDataParallel(convert(model)) instead",
    "DataParallel": "wrapped; call DataParallel(convert(model)) instead",
    "FullyShardedDataParallel": "sharded; convert it before it is sharded",
    "FSDPModule": "sharded; convert it before fully_shard",
    "ScriptModule": "scripted or traced, which cannot be changed; convert it before torch.jit",
}
"""Classes of modules that cannot be converted any more, and the remedies."""


def check_convertible(model: Any) -> None:
    """Raise a TypeError or a ValueError if `model` is not a module whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, but was {article(type(model).__name__)} "
            f"{type(model).__name__}"
        )
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


def check_weights(convolutions: dict[str, Convolution]) -> None:
    """Raise a ValueError if the next forward pass would compute the weight or bias of one anew."""
    for name, convolution in convolutions.items():
        for key in ("weight", "bias"):
            if key in convolution._parameters or parametrize.is_parametrized(convolution, key):
                continue
            raise ValueError(
                f"the {key} of {name!r} must be a parameter, but a hook computes it, as "
                "torch.nn.utils.prune, weight_norm and spectral_norm do; remove the hook first "
                "(prune.remove, remove_weight_norm, remove_spectral_norm)"
            )
