"""What kernels are told of a step: a descriptor of each tensor, the groups' hyperparameters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.spec import (
    DESCRIPTOR_FIELDS,
    DTYPES,
    FIELD,
    HYPERPARAMETER_NAMES,
    SUM_FLAGS,
    StepFlag,
)

# Cost of a filter beside its weights, in weights; kFilterWork of csrc/descriptors.h.
FILTER_WORK = 128


@dataclass(frozen=True, slots=True)
class StepTensor:
    """What a plan knows of one parameter: its layout, and what a step does to it.

    Attributes:
        shape: of the parameter.
        strides: of the parameter, its gradient and its state of the same shape.
        dtype: of the parameter.
        flags: the parts of the method that act on it.
        group_index: its parameter group.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    flags: StepFlag
    group_index: int

    @classmethod
    def of(cls, param: Tensor, flags: StepFlag, group_index: int) -> StepTensor:
        """Return the description of `param`."""
        return cls(tuple(param.shape), param.stride(), param.dtype, flags, group_index)


def is_stepped_by_filter(shape: Sequence[int], flags: StepFlag) -> bool:
    """Return True if a step of this tensor needs sums over its filters or over their taps."""
    if flags & StepFlag.ZERO_MEAN and math.prod(shape[2:]) > 1:
        return True
    return bool(flags & SUM_FLAGS)


def has_supported_strides(shape: Sequence[int], strides: Sequence[int], flags: StepFlag) -> bool:
    """Return True if kernels can step a tensor of this layout.

    Filters must be contiguous or channels_last; other tensors non-overlapping and dense.
    """
    if is_stepped_by_filter(shape, flags):
        channels_last = (0, *range(2, len(shape)), 1)
        return _is_dense_in(shape, strides, range(len(shape))) or _is_dense_in(
            shape, strides, channels_last
        )
    return _is_dense_in(shape, strides, sorted(range(len(shape)), key=lambda d: -strides[d]))


def _is_dense_in(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Return True if dimensions, outermost first, are dense in `order`."""
    if 0 in shape:
        return True
    expected = 1
    for dim in reversed(order):
        if shape[dim] == 1:
            continue
        if strides[dim] != expected:
            return False
        expected *= shape[dim]
    return True


def build_descriptors(
    tensors: Sequence[StepTensor | None], block_numel: int
) -> tuple[np.ndarray, int]:
    """Return the descriptors of a step, and the units of work that they hold.

    Args:
        tensors: what to describe; None describes a tensor without weights.
        block_numel: number of weights in a block of a tensor without filters.

    Returns:
        `(tensors, fields)`, int64, its addresses 0; and the work.

    Raises:
        ValueError: a parameter with strides that kernels do not support.
    """
    descriptors = np.zeros((len(tensors), len(DESCRIPTOR_FIELDS)), dtype=np.int64)
    for descriptor, tensor in zip(descriptors, tensors, strict=True):
        descriptor[FIELD["filter_numel"]] = descriptor[FIELD["taps"]] = 1
        if tensor is not None:
            _describe(descriptor, tensor, block_numel)
    filter_numel = descriptors[:, FIELD["filter_numel"]]
    filters = -(-descriptors[:, FIELD["numel"]] // filter_numel)
    work = filters * (filter_numel + FILTER_WORK)
    descriptors[:, FIELD["first_filter"]] = np.cumsum(filters) - filters
    descriptors[:, FIELD["first_work"]] = np.cumsum(work) - work
    return descriptors, int(work.sum())


def _describe(descriptor: np.ndarray, tensor: StepTensor, block_numel: int) -> None:
    shape, flags = tensor.shape, tensor.flags
    by_filter = is_stepped_by_filter(shape, flags)
    if not has_supported_strides(shape, tensor.strides, flags):
        wanted = "contiguous or channels_last" if by_filter else "non-overlapping and dense"
        raise ValueError(
            f"a parameter of shape {shape} must be {wanted}, but has strides {tensor.strides}; "
            "call .contiguous() on it, or use backend='reference'"
        )
    numel = math.prod(shape)
    values = {
        "numel": numel,
        "filter_numel": max(math.prod(shape[1:]) if by_filter else min(numel, block_numel), 1),
        "taps": math.prod(shape[2:]) if flags & StepFlag.ZERO_MEAN and by_filter else 1,
        "channels_last": by_filter and not _is_dense_in(shape, tensor.strides, range(len(shape))),
        "needs_sums": bool(flags & SUM_FLAGS),
        "dtype": DTYPES[tensor.dtype],
        "group": tensor.group_index,
    }
    for name, value in values.items():
        descriptor[FIELD[name]] = value


@dataclass(frozen=True)
class DeviceScalar:
    """A hyperparameter that kernels read from device memory, so that the host never waits for it.

    Attributes:
        tensor: 0-d, float32, on the device of the parameters.
    """

    tensor: Tensor

    @property
    def address(self) -> int:
        """The address of the number."""
        return self.tensor.data_ptr()


class Hyperparameters:
    """The hyperparameters of every group of a step.

    Args:
        rows: for each group its numbers, in the order of `HYPERPARAMETER_NAMES`.

    Attributes:
        values: `(groups, hyperparameters)`, float64; 0 for a device scalar.
        addresses: `(groups, hyperparameters)`, int64: the address of a device scalar, or 0.
        value_bytes: the bytes of `values`.
    """

    def __init__(self, rows: Sequence[Sequence[float | DeviceScalar]]) -> None:
        self._rows = rows
        shape = (len(rows), len(HYPERPARAMETER_NAMES))
        self.values = np.zeros(shape, dtype=np.float64)
        self.addresses = np.zeros(shape, dtype=np.int64)
        for row, value_row, address_row in zip(rows, self.values, self.addresses, strict=True):
            for column, value in enumerate(row):
                if isinstance(value, DeviceScalar):
                    address_row[column] = value.address
                else:
                    value_row[column] = value
        self.value_bytes = self.values.tobytes()

    def __len__(self) -> int:
        return len(self._rows)

    def replaced(self, numbers: Mapping[tuple[int, int], float]) -> Hyperparameters:
        """Return a copy that has `numbers` instead, by group and position."""
        changed = object.__new__(Hyperparameters)
        changed._rows = rows = list(map(list, self._rows))
        changed.values, changed.addresses = self.values.copy(), self.addresses
        for (index, column), number in numbers.items():
            rows[index][column] = changed.values[index, column] = number
        changed.value_bytes = changed.values.tobytes()
        return changed

    def are_set(self, columns: Sequence[int]) -> tuple[bool, ...]:
        """Return for each group whether its hyperparameters in `columns` may be other than 0."""
        return tuple([
            isinstance(row[column], DeviceScalar) or row[column] != 0
            for row in self._rows
            for column in columns
        ])

    def group(self, index: int) -> dict[str, float | Tensor]:
        """Return a group's hyperparameters by name, device scalars as tensors."""
        return {
            name: value.tensor if isinstance(value, DeviceScalar) else value
            for name, value in zip(HYPERPARAMETER_NAMES, self._rows[index], strict=True)
        }


def scalar(name: str, value: Any, device: torch.device | None) -> float | DeviceScalar:
    """Return hyperparameter `name` as a number, or unread if it is on `device` and not on the CPU.

    Raises:
        ValueError: neither a number nor a tensor of one, or a tensor on `device` not in float32.
    """
    if isinstance(value, numbers.Real):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"{name} must be a number or a 0-d tensor, but was {value!r}")
    if value.device.type == "cpu" or value.device != device:
        return float(value.item())
    if value.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32 on {value.device}, but was {value.dtype}; convert it, or pass "
            "a number"
        )
    return DeviceScalar(value)
