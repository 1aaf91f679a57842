"""The parameters that an optimizer is given: which of them it can step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from czm_fused._internal import sharding
from czm_fused.ops.step.spec import DTYPES, FILTER_FLAGS
from czm_fused.ops.step.state import flags_of


def check_params(group: dict[str, Any]) -> None:
    """Check that the optimizer can step the parameters of `group`.

    Raises:
        TypeError: a parameter that is not real floating point, dense and plain.
        ValueError: a DTensor that splits filters, or parameters on several devices.
    """
    params: list[Tensor] = group["params"]
    for number, param in enumerate(params):
        sharding.check_not_flattened(number, param)
        if param.dtype not in DTYPES:
            raise TypeError(
                f"parameter {number} is {param.dtype}; FusedCZMSGD takes "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )
        if is_traceable_wrapper_subclass(sharding.local(param)):
            raise TypeError(
                f"parameter {number} is a {type(sharding.local(param)).__name__}; FusedCZMSGD "
                "takes plain tensors, and DTensors of them"
            )
        if param.layout != torch.strided:
            raise TypeError(f"parameter {number} is {param.layout}; FusedCZMSGD takes dense ones")
        sharding.check_placements(number, param, bool(flags_of(param, group) & FILTER_FLAGS))
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(
            f"a parameter group must be on one device, but has {', '.join(devices)}; "
            "make one group for each"
        )
