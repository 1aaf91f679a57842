"""The step on CUDA devices: what each block of the kernel in `csrc/cuda` has to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.registry import lib
from czm_fused.ops.table import (
    COLUMN,
    DTYPES,
    GROUP_COLUMNS,
    HyperParameters,
    StepEntry,
    build_table,
)

# The addresses in it keep it out of compiled graphs.
lib.define(
    "launch_step_cuda(Tensor table, Tensor work_items, Tensor grad_addresses, "
    "Tensor hyper_parameters, Tensor hyper_parameter_addresses, int dtype, "
    "Tensor? grad_scale, Tensor? found_inf) -> ()"
)


@torch.library.register_fake("czm_fused::launch_step_cuda", lib=lib)
def _launch_step_cuda_fake(*args: object, **kwargs: object) -> None:
    return None


# Of every launch, as csrc/cuda/step_kernel.cuh and step_filter.cuh have them.
_WARP = 32
_MOST_WORDS = (32764 - 40) // 8
_WORDS_A_GROUP = 2 * len(GROUP_COLUMNS)
_MIXED_DTYPES = -1
_WEIGHTS_A_THREAD = {torch.float32: 20, torch.float64: 10, torch.bfloat16: 24, torch.float16: 24}


@dataclass(frozen=True)
class _Launch:
    """One launch.

    Attributes:
        tensors: which of the plan's tensors it updates.
        groups: the groups that its table means by 0, 1, ...
        table: `(tensors, columns)`, on the device.
        work_items: one row a block, on the device.
        dtype: of all tensors, as the table names it, or `_MIXED_DTYPES`.
    """

    tensors: slice
    groups: list[int]
    table: Tensor
    work_items: Tensor
    dtype: int


class CudaStep:
    """Runs the CUDA kernel over all tensors of a plan, in one launch.

    What stays, the table of the tensors and the list of what each block does, is on the device;
    what changes from step to step, the addresses of the gradients and the hyper-parameters, travels
    as arguments of the kernel. There is room for 4,090 words, one a tensor and 16 a group; a plan
    that needs more makes several launches.

    Args:
        entries: the tensors, all on one CUDA device.

    Raises:
        ValueError: a tensor whose memory the kernel cannot walk.
    """

    block_threads: ClassVar[int] = 256
    # A CUDA graph goes on reading the tables that it was captured with, and nothing tells when it
    # is gone.
    _captured: ClassVar[set[CudaStep]] = set()

    def __init__(self, entries: Sequence[StepEntry]) -> None:
        groups = [entry.group for entry in entries]
        self._launches = [self._launch(entries[tensors], tensors) for tensors in _slices(groups)]
        self._hyper_parameters: HyperParameters | None = None
        self._group_rows: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        grads: Sequence[Tensor],
        grad_addresses: Tensor,
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if self._is_capturing():
            self._captured.add(self)
        if hyper_parameters is not self._hyper_parameters:
            self._hyper_parameters = hyper_parameters
            self._group_rows = [
                (hyper_parameters.values[launch.groups], hyper_parameters.addresses[launch.groups])
                for launch in self._launches
            ]
        for launch, (values, addresses) in zip(self._launches, self._group_rows, strict=True):
            self._run(
                launch.table,
                launch.work_items,
                grad_addresses[launch.tensors],
                values,
                addresses,
                launch.dtype,
                grad_scale,
                found_inf,
            )

    def _launch(self, entries: Sequence[StepEntry], tensors: slice) -> _Launch:
        dtypes = {entry.param.dtype for entry in entries}
        device = entries[0].param.device
        plain_block = self.block_threads * min(_WEIGHTS_A_THREAD[dtype] for dtype in dtypes)
        table, _, _ = build_table(entries, plain_block)
        rows = table.numpy()
        groups, rows[:, COLUMN["group"]] = np.unique(rows[:, COLUMN["group"]], return_inverse=True)
        work_items = torch.from_numpy(_work_items(rows, self.block_threads))
        return _Launch(
            tensors,
            groups.tolist(),
            # Not waiting is safe: memory that is not pinned has been read when the call returns.
            table.to(device, non_blocking=True),
            work_items.to(device, non_blocking=True),
            DTYPES[dtypes.pop()] if len(dtypes) == 1 else _MIXED_DTYPES,
        )

    @staticmethod
    def _run(*arguments: object) -> None:
        torch.ops.czm_fused.launch_step_cuda.default(*arguments)

    @staticmethod
    def _is_capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()


def _slices(groups: Sequence[int]) -> list[slice]:
    """Split the tensors of the given groups into launches."""
    slices = []
    first = 0
    used: set[int] = set()
    for number, group in enumerate(groups):
        words = number + 1 - first + _WORDS_A_GROUP * len(used | {group})
        if words > _MOST_WORDS:
            slices.append(slice(first, number))
            first, used = number, set()
        used.add(group)
    return [*slices, slice(first, len(groups))]


def _work_items(rows: np.ndarray, block_threads: int) -> np.ndarray:
    """Deal the filters of a table out to blocks.

    A filter belongs to a team: the fewest threads, from a warp to a block, that can hold it in
    their registers, else a whole block. So does each part of a plain tensor, a whole block where
    the last part is shorter.

    Returns:
        A row a block, as csrc/cuda/step_kernel.cuh declares it, the blocks with most weights first.
    """
    held = {DTYPES[dtype]: weights for dtype, weights in _WEIGHTS_A_THREAD.items()}
    items = [np.empty((0, 4), dtype=np.int64)]
    for number in np.argsort(-rows[:, COLUMN["filter_numel"]], kind="stable"):
        row = rows[number]
        if row[COLUMN["numel"]] == 0:
            continue
        filter_numel = row[COLUMN["filter_numel"]]
        # A plain tensor's last part, shorter than the others, may take other barriers than they do.
        team = block_threads if row[COLUMN["numel"]] % filter_numel else _WARP
        while team < block_threads and team * held[row[COLUMN["dtype"]]] < filter_numel:
            team *= 2
        teams = block_threads // team
        filters = -(-row[COLUMN["numel"]] // filter_numel)
        first = np.arange(0, filters, teams)
        count = np.minimum(teams, filters - first)
        items.append(
            np.stack(np.broadcast_arrays(number, first, count, team), axis=1).astype(np.int64)
        )
    return np.concatenate(items)
