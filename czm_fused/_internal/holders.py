"""What holds parameters: modules, and for training optimizers, their groups, wrappers."""

from __future__ import annotations

import gc
from collections import Counter

import torch
from torch import nn

from czm_fused.groups import ParamGroups


def shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules of `model` hold."""
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {each for each, count in holders.items() if count > 1}


def holders(parameters: set[int]) -> list[str]:
    """Return the class names of the objects alive that hold any of `parameters` for training."""
    names = []
    for each in gc.get_objects():
        # isinstance would ask proxies for their class, which can import what they stand for.
        if issubclass(type(each), torch.optim.Optimizer):
            groups = getattr(each, "param_groups", [])
        elif issubclass(type(each), ParamGroups):
            groups = each
        elif issubclass(type(each), nn.parallel.DistributedDataParallel):
            groups = [{"params": list(each.parameters())}]
        else:
            continue
        if any(id(parameter) in parameters for group in groups for parameter in group["params"]):
            names.append(type(each).__name__)
    return names
