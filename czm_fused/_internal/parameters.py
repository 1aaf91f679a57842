"""The parameters that an optimizer is given: which of them it can step, and as what."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from czm_fused._internal import sharding
from czm_fused._internal.text import shorten
from czm_fused.ops.step.spec import DTYPES, FILTER_FLAGS
from czm_fused.ops.step.state import check_is_real, flags_of

# The longest kernel of a convolution of two or three dimensions that is common.
_LONGEST_KERNEL = 31
# And where it has a single filter, as embeddings of the positions in an image have.
_LONGEST_KERNEL_OF_ONE = 7


def check_params(group: dict[str, Any]) -> None:
    """Check that the optimizer can step the parameters of `group`.

    Raises:
        TypeError: a parameter that is not floating point, dense and plain, or complex filters.
        ValueError: a DTensor that splits filters, or parameters on several devices.
    """
    params: list[Tensor] = group["params"]
    for number, param in enumerate(params):
        sharding.check_not_flattened(number, param)
        if (param.dtype.to_real() if param.is_complex() else param.dtype) not in DTYPES:
            raise TypeError(
                f"parameter {number} is {param.dtype}; FusedCZMSGD takes "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )
        if is_lazy(param):
            continue
        if is_traceable_wrapper_subclass(sharding.local(param)):
            raise TypeError(
                f"parameter {number} is a {type(sharding.local(param)).__name__}; FusedCZMSGD "
                "takes plain tensors, and DTensors of them"
            )
        if param.layout != torch.strided:
            raise TypeError(f"parameter {number} is {param.layout}; FusedCZMSGD takes dense ones")
        flags = flags_of(param, group)
        sharding.check_placements(number, param, bool(flags & FILTER_FLAGS))
        check_is_real(number, param, flags)
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(
            f"a parameter group must be on one device, but has {', '.join(devices)}; "
            "make one group for each"
        )


def name_params(group: dict[str, Any], index: int) -> None:
    """Give the parameters of a group without names some that tell it and their place in it."""
    params = group["params"]
    if "param_names" in group or isinstance(params, set):
        return
    group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
    if not any(isinstance(param, tuple) for param in params):
        group["param_names"] = [f"group{index}.{number}" for number in range(len(params))]


def level_of_caller() -> int:
    """Return the `stacklevel`, seen from the caller, of the code that made the optimizer."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        level, frame = level + 1, frame.f_back
        if not frame.f_globals.get("__name__", "").startswith(("torch.", "czm_fused.")):
            break
    return level


def warn_of_shapes(group: dict[str, Any]) -> None:
    """Warn of parameters that are stepped as filters and may be none, as their shapes tell."""
    doubtful = [
        tuple(param.shape)
        for param in group["params"]
        if not is_lazy(param) and flags_of(param, group) & FILTER_FLAGS and _is_doubtful(param)
    ]
    if doubtful:
        shapes = list(dict.fromkeys(map(str, doubtful)))
        warnings.warn(
            f"parameters of shape {shorten(shapes)} are taken for filters of convolutions, but may "
            "be embeddings, bilinear weights or stacked networks; pass czm_param_groups(model), "
            "which knows the modules, instead of parameters alone",
            stacklevel=level_of_caller(),
        )


def _is_doubtful(param: Tensor) -> bool:
    """Return True for shapes that weights of convolutions and others have in common."""
    kernel = param.shape[2:]
    if len(kernel) in (0, 1) or len(kernel) > 3:
        return True
    # Filters that are stacked have their input channels where a kernel has its first dimension.
    is_stack = max(kernel) > 2 * min(kernel) > 2
    longest = _LONGEST_KERNEL_OF_ONE if param.shape[0] == 1 else _LONGEST_KERNEL
    return is_stack or max(kernel) > longest


def make_capturable(group: dict[str, Any]) -> None:
    """Keep the learning rate of a capturable group as a tensor on the device of its parameters."""
    if group["capturable"] and group["params"]:
        device = group["params"][0].device
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            group["lr"] = torch.as_tensor(lr, dtype=torch.float32, device=device)
