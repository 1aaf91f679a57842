"""The descriptor table of a step: a row of int64 a tensor, as `csrc/descriptors.h` declares it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from czm_fused import reference

COLUMNS = (
    "param",
    "momentum_buffer",
    "log_scale",
    "log_scale_momentum_buffer",
    "step",
    "param_remainder",
    "numel",
    "filter_numel",
    "taps",
    "channels_last",
    "reduces",
    "dtype",
    "group",
    "first_filter",
    "first_work",
)
COLUMN = {name: index for index, name in enumerate(COLUMNS)}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# One row a parameter group, in float64.
GROUP_COLUMNS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "zmg",
    "luma",
    "nesterov",
    "maximize",
)

# What a filter costs beside its weights, in weights; csrc/descriptors.h has the same.
FILTER_WORK = 128


@dataclass(frozen=True)
class DeviceScalar:
    """A hyper-parameter that kernels read where it lives, so that no host ever waits for it."""

    address: int
    tensor: Tensor = field(compare=False)


class HyperParameters:
    """The hyper-parameters of every group of a step.

    Args:
        rows: one a group, in the order of `GROUP_COLUMNS`; see `hyper_parameter_row`.

    Attributes:
        values: `(groups, columns)`, float64, on the CPU; 0 where a device scalar stands.
        addresses: `(groups, columns)`, int64, on the CPU: the device address of a float32, or 0.
    """

    def __init__(self, rows: Sequence[tuple[float | DeviceScalar, ...]]) -> None:
        self.rows = rows
        self.values = torch.tensor(
            [[0.0 if isinstance(x, DeviceScalar) else x for x in row] for row in rows],
            dtype=torch.float64,
        )
        self.addresses = torch.tensor(
            [[x.address if isinstance(x, DeviceScalar) else 0 for x in row] for row in rows],
            dtype=torch.int64,
        )

    def group(self, number: int) -> dict[str, float | Tensor]:
        """Return a group's hyper-parameters by name, device scalars as tensors."""
        return {
            name: x.tensor if isinstance(x, DeviceScalar) else x
            for name, x in zip(GROUP_COLUMNS, self.rows[number], strict=True)
        }


def hyper_parameter_row(group: dict[str, Any]) -> tuple[float | DeviceScalar, ...]:
    """Return the row of a parameter group: its numbers, and its tensors, unread where the
    parameters' device can read them.

    Raises:
        ValueError: what `scalar` refuses.
    """
    params = group["params"]
    device = params[0].device if params else None
    return tuple([scalar(name, group[name], device) for name in GROUP_COLUMNS])


def scalar(name: str, value: Any, device: torch.device | None) -> float | DeviceScalar:
    """Return hyper-parameter `name` as a number, or unread if it lives on `device`, not the CPU.

    Raises:
        ValueError: neither a number nor a tensor of one, or a tensor on `device` not in float32.
    """
    if isinstance(value, (float, int, numbers.Real)):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"{name} must be a number or a 0-d tensor, but was {value!r}")
    if value.device.type == "cpu" or value.device != device:
        return float(value.item())
    if value.dtype != torch.float32:
        raise ValueError(
            f"{name} is a tensor of {value.dtype} on {value.device}; there it must be float32"
        )
    return DeviceScalar(value.data_ptr(), value)


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One tensor of a step, its state, and what its update rule needs.

    Attributes:
        param: the parameter, updated in place.
        momentum_buffer: of the parameter's shape and layout, or None without momentum.
        log_scale: `(out_channels,)`, or None if the filters are not exp-scaled.
        log_scale_momentum_buffer: `(out_channels,)`, or None.
        step: float32 scalar counting updates, only where dampening needs to know the first.
        param_remainder: int16, of the parameter's shape and layout: what its weights are in float32
            beyond it, see `reference.exact_param`; or None.
        group: the row of the parameter group's hyper-parameters.
        zero_mean: whether CZMG acts on it.
        anchored: whether LUMA acts on it.
    """

    param: Tensor
    momentum_buffer: Tensor | None
    log_scale: Tensor | None
    log_scale_momentum_buffer: Tensor | None
    step: Tensor | None
    param_remainder: Tensor | None
    group: int
    zero_mean: bool
    anchored: bool


def same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order in memory."""
    return all(
        size <= 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each at a place of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_channels_last(weight: Tensor) -> bool:
    """Whether the channels of a tap, not the taps of a channel, are neighbours in memory."""
    return weight.permute(0, *range(2, weight.dim()), 1).is_contiguous()


def check_entry(number: int, entry: StepEntry, device: torch.device) -> None:
    """Check that the state of parameter `number` fits it, since kernels see addresses alone.

    Raises:
        ValueError: a tensor of another shape, dtype, device or memory order than the step needs.
    """
    param = entry.param
    real = reference.compute_dtype(param.dtype)
    per_filter = tuple(param.shape[:1])
    for name, shape, dtype in (
        ("param", tuple(param.shape), param.dtype),
        ("momentum_buffer", tuple(param.shape), param.dtype),
        ("log_scale", per_filter, real),
        ("log_scale_momentum_buffer", per_filter, real),
        ("step", (), torch.float32),
        ("param_remainder", tuple(param.shape), torch.int16),
    ):
        tensor = getattr(entry, name)
        if tensor is None:
            continue
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
            raise ValueError(
                f"the {name} of parameter {number} is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}; it must be {dtype} of shape {shape} "
                f"on {device}"
            )
        like = param if tensor.shape == param.shape else tensor.contiguous()
        if name != "param" and is_dense(like) and not same_memory_order(tensor, like):
            raise ValueError(
                f"the {name} of parameter {number} has strides {tensor.stride()}; they must be "
                f"{like.stride()}"
            )


def build_table(entries: Sequence[StepEntry], plain_block: int) -> tuple[Tensor, int, int]:
    """Lay out the table of a step.

    Args:
        entries: the tensors. An empty one has no filters.
        plain_block: into how many weights a tensor without filters is split.

    Returns:
        The table `(tensors, columns)` on the CPU, the number of filters, and the units of work.

    Raises:
        ValueError: a tensor whose memory the kernels cannot walk.
    """
    table = torch.zeros(len(entries), len(COLUMNS), dtype=torch.int64)
    rows = table.numpy()
    filters = work = 0
    for row, entry in zip(rows, entries, strict=True):
        _fill_row(row, entry, plain_block)
        row[COLUMN["first_filter"]] = filters
        row[COLUMN["first_work"]] = work
        row_filters = -(-row[COLUMN["numel"]] // row[COLUMN["filter_numel"]])
        filters += int(row_filters)
        work += int(row_filters * (row[COLUMN["filter_numel"]] + FILTER_WORK))
    return table, filters, work


def _fill_row(row: np.ndarray, entry: StepEntry, plain_block: int) -> None:
    param = entry.param
    numel = param.numel()
    taps = math.prod(param.shape[2:])
    zero_mean = entry.zero_mean and taps > 1
    reduces = entry.anchored or entry.log_scale is not None
    channels_last = False
    if reduces or zero_mean:
        filter_numel = math.prod(param.shape[1:])
        if not param.is_contiguous():
            channels_last = is_channels_last(param)
            if not channels_last:
                raise ValueError(_layout_message(param, "contiguous or channels_last"))
    else:
        filter_numel = min(numel, plain_block)
        if not is_dense(param):
            raise ValueError(_layout_message(param, "dense"))
    row[COLUMN["param"]] = param.data_ptr()
    for name in (
        "momentum_buffer", "log_scale", "log_scale_momentum_buffer", "step", "param_remainder"
    ):  # fmt: skip
        state = getattr(entry, name)
        row[COLUMN[name]] = 0 if state is None else state.data_ptr()
    row[COLUMN["numel"]] = numel
    row[COLUMN["filter_numel"]] = max(filter_numel, 1)
    row[COLUMN["taps"]] = taps if zero_mean else 1
    row[COLUMN["channels_last"]] = channels_last
    row[COLUMN["reduces"]] = reduces
    row[COLUMN["dtype"]] = DTYPES[param.dtype]
    row[COLUMN["group"]] = entry.group


def _layout_message(param: Tensor, wanted: str) -> str:
    return (
        f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} is not {wanted} "
        "in memory; make it so, or use backend='reference'"
    )
