"""The fused step by Triton: what the kernel reads, kept on the device, and its launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor, build_descriptors
from czm_fused.ops.step.device_table import DeviceTable, keep_for_replays
from czm_fused.ops.step.spec import DTYPES, FIELD, HYPERPARAMETER_NAMES, StepFlag
from czm_fused.ops.step.tensors import StepInputs
from czm_fused.ops.step.triton_kernel import (
    FIELDS,
    HELD_FEW,
    HELD_MANY,
    RECIPROCAL_BITS,
    STREAMED,
    STREAMED_VECTORS,
    WIDE_FIELDS,
    step_kernel,
)
from czm_fused.ops.step.work_items import with_addresses
from czm_fused.ops.triton_utils import TRITON_DTYPES, current, real_dtype

WORK_ITEM = np.dtype([(name, "<i8") for name in WIDE_FIELDS] + [(name, "<i4") for name in FIELDS])
# Offsets inside a filter and numbers of programs are int32, and reach a tile beyond their end.
_INT32_LIMIT = 2**31 - 2**16
# Tiles are a multiple of this many channels, so that aligned filters have aligned tiles.
_VECTOR = 4
# What a thread loads at once, in elements and in bytes of each dtype, and in bytes of remainders.
_VECTORS = np.array([min(_VECTOR, 16 // dtype.itemsize) for dtype in DTYPES])
_VECTOR_BYTES = _VECTORS * [dtype.itemsize for dtype in DTYPES]
_REMAINDER_VECTOR_BYTES = 2 * _VECTOR


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
        self._launches, self._items = _schedule(tensors, self.descriptors)
        self._groups = 1 + int(self.descriptors[:, FIELD["group"]].max(initial=0))
        numbers = self._groups * len(HYPERPARAMETER_NAMES)
        self._item_table = DeviceTable(self._items.nbytes // 8, device)
        self._argument_table = DeviceTable(len(tensors) + 2 * numbers + (numbers + 1) // 2, device)
        # What was sent last, and what it was made of.
        self._addresses: bytes | None = None
        self._hyperparameters: Hyperparameters | None = None
        self._itemized, self._item_words = b"", np.empty(0, dtype=np.int64)
        self._argument_words = np.empty(0, dtype=np.int64)

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if not self._launches:
            return
        if inputs.addresses != self._addresses:
            self._set_item_words(inputs)
            self._addresses, self._hyperparameters = inputs.addresses, None
        if hyperparameters is not self._hyperparameters:
            self._argument_words = self._words_of(inputs, hyperparameters)
            self._hyperparameters = hyperparameters
        with current(self._device):
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                states = [list(state.values()) for state in inputs.states if state]
                keep_for_replays(states, hyperparameters, grad_scale, found_inf)
            items = self._item_table.send(self._item_words)
            arguments = self._argument_table.send(self._argument_words)
            for launch in self._launches:
                launch(items, arguments, len(inputs.params), self._groups, grad_scale, found_inf)

    def _set_item_words(self, inputs: StepInputs) -> None:
        descriptors, grads = inputs.tables()
        # A program that had to know its gradient's address first would ask for its weights later,
        # so the item says how that address is aligned, and no more.
        misaligned = grads % _VECTOR_BYTES[descriptors[:, FIELD["dtype"]]] != 0
        itemized = descriptors.tobytes() + misaligned.tobytes()
        if itemized != self._itemized:
            items = with_addresses(self._items, descriptors)
            _stream_misaligned(items, descriptors, misaligned)
            self._itemized, self._item_words = itemized, items.view(np.int64)

    def _words_of(self, inputs: StepInputs, hyperparameters: Hyperparameters) -> np.ndarray:
        addresses = hyperparameters.addresses[: self._groups]
        values = hyperparameters.values[: self._groups]
        # float64 stays out of a float32 kernel, since not every device has it.
        rounded = np.zeros(values.size + values.size % 2, dtype=np.float32)
        rounded[: values.size] = values.ravel()
        _, grads = inputs.tables()
        data = grads.tobytes() + addresses.tobytes() + values.tobytes() + rounded.tobytes()
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
        items: Tensor,
        arguments: Tensor,
        tensor_count: int,
        group_count: int,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        numbers = (tensor_count, group_count, self._first_program)
        key = grad_scale is None, found_inf is None
        if key in self._compiled:
            self._compiled[key](
                items, arguments, *numbers, grad_scale, found_inf, *self._constants.values()
            )
            return
        kernel = step_kernel[self._grid](
            items,
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
) -> tuple[list[_Launch], np.ndarray]:
    """Deal the filters of all tensors out to programs, and these to launches.

    Returns:
        The launches, and the work item of each program, without addresses.
    """
    numbers_of: dict[tuple[torch.dtype, bool, LaunchShape], list[int]] = {}
    for number, (tensor, row) in enumerate(zip(tensors, descriptors, strict=True)):
        if tensor is None or row[FIELD["numel"]] == 0:
            continue
        shape, long_shape = launch_shapes(tensor.dtype)
        if tiles_of(row, shape.tile).number > shape.many:
            shape = long_shape
        split = bool(tensor.flags & StepFlag.MASTER_WEIGHTS)
        numbers_of.setdefault((tensor.dtype, split, shape), []).append(number)

    launches, items, first = [], [np.empty(0, dtype=WORK_ITEM)], 0
    for (dtype, split, shape), numbers in numbers_of.items():
        # Longer programs start first, so that short ones fill the processors up at the end.
        numbers.sort(key=lambda number: -descriptors[number, FIELD["filter_numel"]])
        rows = descriptors[numbers]
        programs = int((-(-rows[:, FIELD["numel"]] // rows[:, FIELD["filter_numel"]])).sum())
        _check_counts(rows, first + programs)
        items += [_items_of(descriptors[number], number, shape) for number in numbers]
        launches.append(_Launch(first, programs, dtype, split, shape))
        first += programs
    return launches, np.concatenate(items)


def _check_counts(rows: np.ndarray, programs: int) -> None:
    filter_numel = rows[:, FIELD["filter_numel"]].max()
    if filter_numel > _INT32_LIMIT or programs > _INT32_LIMIT:
        raise ValueError(
            f"the triton backend takes filters of at most {_INT32_LIMIT} weights and as many "
            f"filters, but has one of {filter_numel} among {programs}; use backend='reference'"
        )


class Tiles(NamedTuple):
    """The tiles of a filter.

    Attributes:
        channels: of the filter.
        tile_channels: of a tile; 0 where a channel has more taps than fit, which has its own path.
        number: of tiles.
    """

    channels: int
    tile_channels: int
    number: int


def tiles_of(row: np.ndarray, tile: int) -> Tiles:
    """Return the tiles, of at most `tile` weights, of a filter of the tensor in `row`."""
    taps, filter_numel = int(row[FIELD["taps"]]), int(row[FIELD["filter_numel"]])
    channels = filter_numel // taps
    tile_channels = channels if filter_numel <= tile else tile // taps // _VECTOR * _VECTOR
    number = -(-channels // tile_channels) if tile_channels else channels * -(-taps // tile)
    return Tiles(channels, tile_channels, number)


def _items_of(row: np.ndarray, number: int, shape: LaunchShape) -> np.ndarray:
    """Return the work items of a tensor whose memory is aligned."""
    numel, filter_numel = int(row[FIELD["numel"]]), int(row[FIELD["filter_numel"]])
    channels, tile_channels, tiles = tiles_of(row, shape.tile)
    first = np.arange(0, numel, filter_numel)
    items = np.zeros(len(first), dtype=WORK_ITEM)
    items["first"] = first
    # The last block of a plain tensor is shorter than the others.
    items["numel"] = np.minimum(numel - first, filter_numel)
    items["taps"] = row[FIELD["taps"]]
    items["channels"] = np.minimum(channels, items["numel"])
    # Nothing depends on the layout of single taps.
    channels_last = bool(row[FIELD["channels_last"]]) and row[FIELD["taps"]] > 1
    items["channels_last"] = channels_last
    items["tile_channels"] = tile_channels
    divisor = tile_channels if channels_last else int(row[FIELD["taps"]])
    items["reciprocal"] = -(-(1 << RECIPROCAL_BITS) // max(divisor, 1))
    items["needs_sums"] = row[FIELD["needs_sums"]]
    items["tensor"], items["group"] = number, row[FIELD["group"]]
    path = HELD_FEW if tiles <= shape.few else HELD_MANY
    if tiles > shape.many:
        path = STREAMED_VECTORS
    # Vectors are whole where the runs of a filter's memory are: all of it, or a tap's channels.
    runs = items["channels"] if channels_last else items["numel"]
    vector = _VECTORS[row[FIELD["dtype"]]]
    items["path"] = np.where((runs % vector == 0) & (tile_channels > 0), path, STREAMED)
    return items


def _stream_misaligned(items: np.ndarray, descriptors: np.ndarray, misaligned: np.ndarray) -> None:
    """Have items of misaligned memory stepped one element at a time.

    Args:
        items: with addresses.
        misaligned: which tensors have misaligned gradients.
    """
    dtypes = descriptors[items["tensor"], FIELD["dtype"]]
    addresses = items["param"] | items["momentum_buffer"]
    in_vectors = addresses % _VECTOR_BYTES[dtypes] == 0
    in_vectors &= items["param_remainder"] % _REMAINDER_VECTOR_BYTES == 0
    in_vectors &= ~misaligned[items["tensor"]]
    items["path"][~in_vectors] = STREAMED
