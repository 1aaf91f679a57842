"""The fused step by Triton: what the kernel reads, kept on the device, and its launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor, build_descriptors
from czm_fused.ops.step.device_table import DeviceTable, keep_for_replays
from czm_fused.ops.step.spec import (
    DESCRIPTOR_FIELDS,
    FIELD,
    HYPERPARAMETER_NAMES,
    StepFlag,
)
from czm_fused.ops.step.tensors import StepInputs
from czm_fused.ops.step.triton_kernel import RECIPROCAL_BITS, TILE_FIELDS, step_kernel
from czm_fused.ops.triton_utils import TRITON_DTYPES, current, real_dtype

_COLUMNS = len(DESCRIPTOR_FIELDS) + len(TILE_FIELDS)
# Offsets inside a filter and numbers of programs are int32, and reach a tile beyond their end.
_INT32_LIMIT = 2**31 - 2**16
# Tiles are a multiple of this many channels, so that aligned filters have aligned tiles.
_VECTOR = 4


class LaunchShape(NamedTuple):
    """How a launch shares the work of a filter out.

    Attributes:
        num_warps: the warps of a program.
        few: the tiles of the filters that registers hold,
        many: and of the longest that they hold.
    """

    num_warps: int
    few: int
    many: int

    @property
    def tile(self) -> int:
        """The weights of a tile: four a thread."""
        return 128 * self.num_warps


# Short programs are bound by latency, and more of them fit a processor with fewer warps each.
_SHORT, _LONG, _LONG_FLOAT64 = LaunchShape(2, 1, 3), LaunchShape(8, 2, 5), LaunchShape(4, 1, 3)
# Weights in a block of a tensor without filters: as many as registers hold.
_BLOCK_NUMEL = _LONG.many * _LONG.tile


class TritonStep:
    """Runs the Triton kernel over all tensors of a plan.

    Each dtype among them takes a launch for its short filters and one for its long ones, and as
    many more where some tensors of a dtype have master weights and others not.

    Args:
        tensors: the parameters as planned, on one device; None for those not stepped.
        device: the device.

    Attributes:
        descriptors: the descriptors of all tensors, without addresses.

    Raises:
        ValueError: a tensor that is too large for the kernel.
    """

    unscales_grads = False

    def __init__(self, tensors: Sequence[StepTensor | None], device: torch.device) -> None:
        self.descriptors, _ = build_descriptors(tensors, _BLOCK_NUMEL)
        self._device = device
        self._launches, self._tiles, self._program_rows = _schedule(tensors, self.descriptors)
        self._groups = 1 + int(self.descriptors[:, FIELD["group"]].max(initial=0))
        numbers = self._groups * len(HYPERPARAMETER_NAMES)
        self._rows = DeviceTable(len(tensors) * _COLUMNS + len(self._program_rows), device)
        self._arguments = DeviceTable(len(tensors) + 2 * numbers + (numbers + 1) // 2, device)
        # What was sent last, and what it was made of.
        self._described, self._words = b"", np.empty(0, dtype=np.int64)
        self._argued: tuple[bytes, Hyperparameters | None] = b"", None
        self._argument_words = np.empty(0, dtype=np.int64)

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        descriptors, grads = inputs.tables()
        described = descriptors.tobytes()
        if described != self._described:
            rows = np.concatenate([descriptors, self._tiles], axis=1)
            self._words = np.concatenate([rows.ravel(), self._program_rows])
            self._described = described
        grad_bytes = grads.tobytes()
        if grad_bytes != self._argued[0] or hyperparameters is not self._argued[1]:
            self._argument_words = self._words_of(grad_bytes, hyperparameters)
            self._argued = grad_bytes, hyperparameters
        with current(self._device):
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                states = [list(state.values()) for state in inputs.states if state]
                keep_for_replays(states, hyperparameters, grad_scale, found_inf)
            tables = self._rows.send(self._words), self._arguments.send(self._argument_words)
            for launch in self._launches:
                launch(*tables, len(grads), self._groups, grad_scale, found_inf)

    def _words_of(self, grads: bytes, hyperparameters: Hyperparameters) -> np.ndarray:
        addresses = hyperparameters.addresses[: self._groups]
        values = hyperparameters.values[: self._groups]
        # float64 stays out of a float32 kernel, since not every device has it.
        rounded = np.zeros(values.size + values.size % 2, dtype=np.float32)
        rounded[: values.size] = values.ravel()
        data = grads + addresses.tobytes() + values.tobytes() + rounded.tobytes()
        return np.frombuffer(data, dtype=np.int64)


class _Launch:
    """A launch over programs that follow one another: tensors of one dtype, all split or none."""

    def __init__(
        self, first_program: int, programs: int, dtype: torch.dtype, split: bool, shape: LaunchShape
    ) -> None:
        self._first_program, self._grid = first_program, (programs, 1, 1)
        self._constants = kernel_constants(dtype, split, shape)
        self._num_warps = shape.num_warps
        # The compiled kernel's own launcher, by which of the two optional arguments there are:
        # Triton's takes longer to find out that nothing is to be compiled than to launch.
        self._compiled: dict[tuple[bool, bool], Callable[..., None]] = {}

    def __call__(
        self,
        rows: Tensor,
        arguments: Tensor,
        row_count: int,
        group_count: int,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        numbers = (row_count, group_count, self._first_program)
        key = grad_scale is None, found_inf is None
        if key in self._compiled:
            self._compiled[key](
                rows, arguments, *numbers, grad_scale, found_inf, *self._constants.values()
            )
            return
        kernel = step_kernel[self._grid](
            rows,
            arguments,
            *numbers,
            grad_scale,
            found_inf,
            **self._constants,
            num_warps=self._num_warps,
            enable_fp_fusion=False,
        )
        # The interpreter compiles nothing.
        if kernel is not None:
            self._compiled[key] = kernel[self._grid]


def kernel_constants(dtype: torch.dtype, split: bool, shape: LaunchShape) -> dict[str, object]:
    """Return the kernel's constexpr arguments."""
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "REAL": real_dtype(dtype),
        "SPLIT": split,
        "TILE": shape.tile,
        "FEW": shape.few,
        "MANY": shape.many,
    }


def launch_shapes(dtype: torch.dtype) -> tuple[LaunchShape, LaunchShape]:
    """Return the shapes of the launches for short and for long filters of `dtype`."""
    return _SHORT, _LONG_FLOAT64 if dtype == torch.float64 else _LONG


def _schedule(
    tensors: Sequence[StepTensor | None], descriptors: np.ndarray
) -> tuple[list[_Launch], np.ndarray, np.ndarray]:
    """Deal the filters of all tensors out to programs, and these to launches.

    Sets the descriptors' first filters, and their layout where nothing depends on it.

    Returns:
        The launches, the `TILE_FIELDS` of each tensor, and the row of each program.
    """
    tiles = np.zeros((len(tensors), len(TILE_FIELDS)), dtype=np.int64)
    numbers_of: dict[tuple[torch.dtype, bool, LaunchShape], list[int]] = {}
    for number, (tensor, row) in enumerate(zip(tensors, descriptors, strict=True)):
        if tensor is None or row[FIELD["numel"]] == 0:
            continue
        if row[FIELD["taps"]] == 1:
            row[FIELD["channels_last"]] = 0
        shape, long_shape = launch_shapes(tensor.dtype)
        tiles[number] = _tile_fields(row, shape.tile)
        if tiles[number, TILE_FIELDS.index("tiles")] > shape.many:
            shape = long_shape
            tiles[number] = _tile_fields(row, shape.tile)
        split = bool(tensor.flags & StepFlag.MASTER_WEIGHTS)
        numbers_of.setdefault((tensor.dtype, split, shape), []).append(number)

    launches, program_rows, first = [], [np.empty(0, dtype=np.int64)], 0
    for (dtype, split, shape), numbers in numbers_of.items():
        # Longer programs start first, so that short ones fill the processors up at the end.
        numbers.sort(key=lambda number: -descriptors[number, FIELD["filter_numel"]])
        rows = descriptors[numbers]
        programs = -(-rows[:, FIELD["numel"]] // rows[:, FIELD["filter_numel"]])
        _check_counts(rows, first + int(programs.sum()))
        descriptors[numbers, FIELD["first_filter"]] = first + np.cumsum(programs) - programs
        program_rows.append(np.repeat(np.array(numbers, dtype=np.int64), programs))
        launches.append(_Launch(first, int(programs.sum()), dtype, split, shape))
        first += int(programs.sum())
    return launches, tiles, np.concatenate(program_rows)


def _check_counts(rows: np.ndarray, programs: int) -> None:
    filter_numel = rows[:, FIELD["filter_numel"]].max()
    if filter_numel > _INT32_LIMIT or programs > _INT32_LIMIT:
        raise ValueError(
            f"the triton backend takes filters of at most {_INT32_LIMIT} weights and as many "
            f"filters, but has one of {filter_numel} among {programs}; use backend='reference'"
        )


def _tile_fields(row: np.ndarray, tile: int) -> tuple[int, int, int, int]:
    """Return the `TILE_FIELDS` of a tensor in tiles of `tile` weights."""
    taps, filter_numel = int(row[FIELD["taps"]]), int(row[FIELD["filter_numel"]])
    channels = filter_numel // taps
    # A channel of more taps than fit has a path of its own.
    tile_channels = channels if filter_numel <= tile else tile // taps // _VECTOR * _VECTOR
    tiles = -(-channels // tile_channels) if tile_channels else channels * -(-taps // tile)
    divisor = tile_channels if row[FIELD["channels_last"]] else taps
    return channels, tile_channels, tiles, -(-(1 << RECIPROCAL_BITS) // max(divisor, 1))
