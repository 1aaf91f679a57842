"""The step on CUDA devices: what each warp of the kernel in `csrc/cuda` has to do."""

# torch is typed in part.
# mypy: allow-untyped-calls, allow-untyped-decorators, no-warn-return-any

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor, build_descriptors
from czm_fused.ops.step.device_table import DeviceTable, keep_for_replays
from czm_fused.ops.step.spec import DTYPES, FIELD, HYPERPARAMETER_NAMES
from czm_fused.ops.step.tensors import StepInputs
from czm_fused.ops.step.work_items import with_addresses

_LOG_WARP = 5
_WARP = 1 << _LOG_WARP
_PACK_BYTES = 16
_SECTOR_BYTES = 32
_WORDS_A_GROUP = 2 * len(HYPERPARAMETER_NAMES)
_MOST_FILTER_NUMEL = 2**31 - 2**20

# As csrc/cuda/work_item.h has them.
FEW_WORDS = (4096 - 32) // 8
MANY_WORDS = (32764 - 32) // 8
IN_PACKS, CHANNELS_LAST, NEEDS_SUMS = 1, 2, 4
_FLAG_BITS = 3
_WIDE_FIELDS = (
    "param", "momentum_buffer", "param_remainder", "log_scale", "log_scale_momentum_buffer", "step",
    "first",
)  # fmt: skip
_FIELDS = ("numel", "filter_numel", "taps", "tensor", "group", "flags")
WORK_ITEM = np.dtype([(name, "<i8") for name in _WIDE_FIELDS] + [(name, "<i4") for name in _FIELDS])


class Size(NamedTuple):
    """What a thread has of tensors of one dtype; see csrc/cuda/step_kernel.cuh."""

    itemsize: int
    compute_itemsize: int
    weights: int  # in its registers
    weights_of_large: int  # the same of large blocks

    def held(self, has_large_blocks: bool) -> int:
        """Return how many weights of a filter a thread holds."""
        return self.weights_of_large if has_large_blocks else self.weights


SIZES = {
    DTYPES[torch.float32]: Size(4, 4, 20, 80),
    DTYPES[torch.float64]: Size(8, 8, 8, 40),
    DTYPES[torch.bfloat16]: Size(2, 4, 24, 80),
    DTYPES[torch.float16]: Size(2, 4, 24, 80),
}


@dataclass
class Launch:
    """One launch, of one kernel.

    Attributes:
        dtype: of its tensors, as descriptors number it.
        has_large_blocks: its blocks have all registers of a multiprocessor, not half of them, for
            filters that no small block holds.
        tensors: the tensors of the plan that it updates, as indices.
        groups: the groups that its work items mean by 0, 1, ...
        items: what each warp does, as csrc/cuda/work_item.h has it; whole blocks.
        words: the same as int64.
        blocks: how many.
        table: the items on the device.
    """

    dtype: int
    has_large_blocks: bool
    tensors: np.ndarray
    groups: np.ndarray
    items: np.ndarray
    words: np.ndarray
    blocks: int
    table: DeviceTable

    def set_addresses(self, descriptors: np.ndarray) -> None:
        """Write the addresses of `descriptors`, those of all tensors of the plan, to new items."""
        self.items = with_addresses(self.items, descriptors[self.tensors])
        self.words = self.items.view(np.int64)


class LaunchArguments(NamedTuple):
    """What a launch is given, as csrc/cuda/step.h has it; 0 for the address of nothing."""

    dtype: int
    has_large_blocks: bool
    items: int
    blocks: int
    grads: bytes
    tensors: int
    hyperparameters: bytes
    hyperparameter_addresses: bytes
    groups: int
    grad_scale: int
    found_inf: int


class CudaStep:
    """Runs the CUDA kernel over all tensors of a plan: a launch for each dtype.

    The work items are kept on the device, and sent again only when an address has changed. The
    addresses of the gradients and the hyperparameters, which change from step to step, are
    arguments of the kernel. There is room for 4,091 words, one for each tensor and 18 for each
    group, or for 508 in a capture; a plan that needs more makes more launches, and so do filters
    of more weights than a small block holds (5,120 of float32, 2,048 of float64, 6,144 of half
    types). What is larger than a large block (20,480, 10,240 and 20,480) has its weights and
    gradients read twice.

    Args:
        tensors: the parameters as planned, all on one CUDA device; None for those not stepped.
        device: the device.

    Attributes:
        descriptors: the descriptors of all tensors, without addresses.

    Raises:
        ValueError: a filter of more weights than the kernel can count.
    """

    block_threads: ClassVar[int] = 256

    unscales_grads = True

    def __init__(self, tensors: Sequence[StepTensor | None], device: torch.device) -> None:
        # Tensors without filters are cut up here.
        self.descriptors, _ = build_descriptors(tensors, _MOST_FILTER_NUMEL)
        if (self.descriptors[:, FIELD["filter_numel"]] > _MOST_FILTER_NUMEL).any():
            raise ValueError(
                f"the cuda backend takes filters of at most {_MOST_FILTER_NUMEL} weights; use "
                "backend='reference'"
            )
        self._device = device
        self._launches: dict[int, list[Launch]] = {}
        self._addresses: dict[int, bytes] = {}

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        is_capturing = self._is_capturing()
        if is_capturing:
            states = [list(state.values()) for state in inputs.states if state]
            keep_for_replays(states, hyperparameters, grad_scale, found_inf)
        assert inputs.addresses is not None
        count = len(inputs.params)
        grads = inputs.addresses[-8 * count :] if count else b""
        launches = self._launches_at(inputs, FEW_WORDS if is_capturing else self._most_words())
        for launch in launches:
            is_whole = len(launch.tensors) == count
            some_groups = len(launch.groups) != len(hyperparameters)
            values, addresses = hyperparameters.values, hyperparameters.addresses
            self._run(
                launch,
                LaunchArguments(
                    launch.dtype,
                    launch.has_large_blocks,
                    launch.table.send(launch.words).data_ptr(),
                    launch.blocks,
                    grads if is_whole else _select(grads, launch.tensors),
                    len(launch.tensors),
                    values[launch.groups].tobytes() if some_groups else hyperparameters.value_bytes,
                    (addresses[launch.groups] if some_groups else addresses).tobytes(),
                    len(launch.groups),
                    0 if grad_scale is None else grad_scale.data_ptr(),
                    0 if found_inf is None else found_inf.data_ptr(),
                ),
            )

    def _launches_at(self, inputs: StepInputs, most_words: int) -> list[Launch]:
        """Return the launches of at most so many words, with the addresses of `inputs`."""
        launches = self._launches.get(most_words)
        if launches is None:
            launches = self._launches[most_words] = [
                self._launch(dtype, has_large_blocks, part)
                for (dtype, has_large_blocks), numbers in _kinds(
                    self.descriptors, self.block_threads
                ).items()
                for part in _parts(
                    self.descriptors, numbers, FEW_WORDS if has_large_blocks else most_words
                )
            ]
        assert inputs.addresses is not None
        addresses = inputs.addresses[: -8 * len(inputs.params)]
        if self._addresses.get(most_words) != addresses:
            descriptors, _ = inputs.tables()
            for launch in launches:
                launch.set_addresses(descriptors)
            self._addresses[most_words] = addresses
        return launches

    def _launch(self, dtype: int, has_large_blocks: bool, tensors: np.ndarray) -> Launch:
        rows = self.descriptors[tensors]
        groups, group_indices = np.unique(rows[:, FIELD["group"]], return_inverse=True)
        items = work_items(rows, group_indices, self.block_threads, has_large_blocks)
        return Launch(
            dtype,
            has_large_blocks,
            tensors,
            groups,
            items,
            items.view(np.int64),
            len(items) * _WARP // self.block_threads,
            DeviceTable(items.nbytes // 8, self._device),
        )

    def _run(self, launch: Launch, arguments: LaunchArguments) -> None:
        _native().launch_step(self._device.index, *arguments)

    def _is_capturing(self) -> bool:
        is_capturing: bool = _native().stream_of(self._device.index)[1]
        return is_capturing

    def _most_words(self) -> int:
        return _most_words(self._device.index)


@functools.cache
def _native() -> Any:
    from czm_fused import _C_cuda  # type: ignore[attr-defined]

    return _C_cuda


@functools.cache
def _most_words(device: int) -> int:
    most_words: int = _native().most_words(device)
    return most_words


def _select(words: bytes, numbers: np.ndarray) -> bytes:
    return np.frombuffer(words, dtype=np.int64)[numbers].tobytes()


def _is_plain(rows: np.ndarray) -> np.ndarray:
    """Return True for tensors whose weights do not depend on each other, wherever they are cut."""
    return (rows[:, FIELD["taps"]] == 1) & (rows[:, FIELD["needs_sums"]] == 0)


def _kinds(rows: np.ndarray, block_threads: int) -> dict[tuple[int, bool], np.ndarray]:
    """Return the tensors of each dtype, those of large filters apart from the others."""
    held = np.zeros(len(SIZES), dtype=np.int64)
    for dtype, size in SIZES.items():
        held[dtype] = block_threads * size.weights
    dtypes = rows[:, FIELD["dtype"]]
    has_large_blocks = ~_is_plain(rows) & (rows[:, FIELD["filter_numel"]] > held[dtypes])
    has_weights = rows[:, FIELD["numel"]] > 0
    kinds = {}
    for dtype in SIZES:
        for large in (False, True):
            numbers = np.flatnonzero(has_weights & (dtypes == dtype) & (has_large_blocks == large))
            if len(numbers):
                kinds[dtype, large] = numbers
    return kinds


def _parts(rows: np.ndarray, numbers: np.ndarray, most_words: int) -> list[np.ndarray]:
    """Split tensors into those of launches of at most so many words."""
    parts = []
    first = 0
    used: set[int] = set()
    for n, group in enumerate(rows[numbers, FIELD["group"]].tolist()):
        if n + 1 - first + _WORDS_A_GROUP * len(used | {group}) > most_words:
            parts.append(numbers[first:n])
            first, used = n, set()
        used.add(group)
    return [*parts, numbers[first:]]


def work_items(
    rows: np.ndarray, group_indices: np.ndarray, block_threads: int, has_large_blocks: bool
) -> np.ndarray:
    """Deal the filters of a launch out to the warps of its blocks.

    A filter belongs to the fewest threads, a power of two from one to a block, whose registers can
    hold it, else to a whole block. A warp has the filters of as many such thread groups as it
    holds; a tensor without filters is cut into pieces of what a warp holds.

    Args:
        rows: the descriptors of the launch, all of one dtype.
        group_indices: the group of each, as the launch numbers it.
        block_threads: threads of a block.
        has_large_blocks: as in `Launch`.

    Returns:
        A `WORK_ITEM` for each warp of whole blocks, without addresses, those of several warps and
        of the most weights first.
    """
    dealt = [
        _deal(row, number, int(group), block_threads, has_large_blocks)
        for number, (row, group) in enumerate(zip(rows, group_indices, strict=True))
    ]
    # Larger thread groups first, so that the warps of each are neighbours in one block.
    dealt.sort(key=lambda items: (items[0]["flags"] >> _FLAG_BITS, items[0]["numel"]), reverse=True)
    warps = block_threads // _WARP
    count = sum(map(len, dealt))
    idle = np.zeros(-count % warps, dtype=WORK_ITEM)
    idle["filter_numel"] = idle["taps"] = 1
    # The path without barriers, for a warp each.
    idle["flags"] = _LOG_WARP << _FLAG_BITS | IN_PACKS
    return np.concatenate([*dealt, idle])


def _deal(
    row: np.ndarray, number: int, group: int, block_threads: int, has_large_blocks: bool
) -> np.ndarray:
    size = SIZES[int(row[FIELD["dtype"]])]
    numel, filter_numel = int(row[FIELD["numel"]]), int(row[FIELD["filter_numel"]])
    held = size.held(has_large_blocks)
    # Large blocks have no thread group of less than a warp.
    log_threads = _LOG_WARP if has_large_blocks else 0
    if _is_plain(row[np.newaxis])[0]:
        filter_numel, log_threads = held * _WARP, _LOG_WARP
    while (1 << log_threads) < block_threads and filter_numel > held << log_threads:
        log_threads += 1
    threads = 1 << log_threads
    numel_a_warp = filter_numel * max(_WARP // threads, 1)
    first = np.arange(0, numel, numel_a_warp)
    items = np.zeros(len(first), dtype=WORK_ITEM)
    items["first"] = first
    items["numel"] = np.minimum(numel_a_warp, numel - first)
    items["filter_numel"] = filter_numel
    items["taps"] = row[FIELD["taps"]]
    items["tensor"] = number
    items["group"] = group
    flags = CHANNELS_LAST * bool(row[FIELD["channels_last"]])
    flags |= NEEDS_SUMS * bool(row[FIELD["needs_sums"]])
    in_packs = (items["numel"] % (_PACK_BYTES // size.itemsize) == 0) & _is_in_packs(
        filter_numel * size.itemsize, threads
    )
    items["flags"] = log_threads << _FLAG_BITS | flags | IN_PACKS * in_packs
    return np.repeat(items, max(threads // _WARP, 1))


def _is_in_packs(filter_bytes: int, threads: int) -> bool:
    """Return True if the threads of a filter should each move whole packs of it.

    A few threads move less than whole sectors at a time, unless these begin where sectors do.
    """
    if filter_bytes % _PACK_BYTES:
        return False
    return threads >= 8 or (threads >= 2 and filter_bytes % _SECTOR_BYTES == 0)
