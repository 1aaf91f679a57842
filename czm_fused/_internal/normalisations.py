"""Know normalisations, of torch and of other libraries."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

OTHER_NORMALISATIONS = (
    _NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)

NAMES_OF_NORMALISATIONS = re.compile(r"[Nn]orm|NORM|[A-Z]BN|BN$|BN\dd|FRN|FilterResponse")
"""Parts of class names of other libraries' normalisations, which share no base class."""

TIMM_BATCH_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")
"""timm's BatchNorms, whose children `drop` and `act` are applied to their result, in that order."""


def computes_batch_norm(norm: _BatchNorm) -> bool:
    """Return True if its class computes what torch's BatchNorm does, or timm's."""
    kind = type(norm)
    # timm's have an activation as a child. They are known by name, as timm may not be installed.
    if kind.__module__.startswith("timm.") and kind.__name__ in TIMM_BATCH_NORMS:
        return True
    forward = kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return forward and "forward" not in vars(norm) and not any(norm.children())


def is_other_normalisation(module: nn.Module) -> bool:
    """Return True if a module that is no BatchNorm is a normalisation, as far as can be told."""
    if isinstance(module, OTHER_NORMALISATIONS):
        return True
    if {"running_mean", "running_var"} <= module._buffers.keys():
        return True
    name = type(module).__name__
    return bool(NAMES_OF_NORMALISATIONS.search(name)) and not any(module.children())
