"""The step on CUDA devices: what each block of the kernel in `csrc/cuda` has to do."""

# torch is typed in part.
# mypy: allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.registry import lib
from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor, build_descriptors
from czm_fused.ops.step.device_table import DeviceTable
from czm_fused.ops.step.spec import DTYPES, FIELD, HYPERPARAMETER_NAMES
from czm_fused.ops.step.tensors import StepInputs

# It takes addresses, so it has no place in a compiled graph.
lib.define(
    "launch_step_cuda(Tensor descriptors, Tensor work_items, Tensor grad_addresses, "
    "Tensor hyperparameters, Tensor hyperparameter_addresses, int dtype, "
    "Tensor? grad_scale, Tensor? found_inf) -> ()"
)


@torch.library.register_fake("czm_fused::launch_step_cuda", lib=lib)
def _launch_step_cuda_fake(*args: object, **kwargs: object) -> None:
    return None


# Of every launch, as csrc/cuda/step_kernel.cuh and step_filter.cuh have them.
_WARP = 32
_MOST_WORDS = (32764 - 40) // 8
_WORDS_A_GROUP = 2 * len(HYPERPARAMETER_NAMES)
_MIXED_DTYPES = -1
_WEIGHTS_A_THREAD = {torch.float32: 20, torch.float64: 10, torch.bfloat16: 24, torch.float16: 24}


@dataclass(frozen=True)
class _Launch:
    """One launch.

    Attributes:
        tensors: the tensors of the plan that it updates.
        groups: the groups that its descriptors mean by 0, 1, ...
        group_indices: the group of each descriptor, as an index of `groups`.
        descriptors: on the device.
        work_items: one row a block, int64.
        work_item_table: the same on the device.
        dtype: of all tensors, as descriptors number it, or `_MIXED_DTYPES`.
    """

    tensors: slice
    groups: np.ndarray
    group_indices: np.ndarray
    descriptors: DeviceTable
    work_items: np.ndarray
    work_item_table: DeviceTable
    dtype: int


class CudaStep:
    """Runs the CUDA kernel over all tensors of a plan, in one launch.

    The descriptors and the list of what each block does are kept on the device, and sent again
    only when an address has changed. The addresses of the gradients and the hyperparameters, which
    change from step to step, are arguments of the kernel. There is room for 4,090 words, one for
    each tensor and 16 for each group; a plan that needs more makes several launches.

    Args:
        tensors: the parameters as planned, all on one CUDA device; None for those not stepped.
        device: the device.

    Attributes:
        descriptors: the descriptors of all tensors, without addresses.
    """

    block_threads: ClassVar[int] = 256

    def __init__(self, tensors: Sequence[StepTensor | None], device: torch.device) -> None:
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        weights = min((_WEIGHTS_A_THREAD[dtype] for dtype in dtypes), default=1)
        self.descriptors, _ = build_descriptors(tensors, self.block_threads * weights)
        groups = self.descriptors[:, FIELD["group"]].tolist()
        self._launches = [
            self._launch(self.descriptors[part], part, device) for part in _slices(groups)
        ]

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        descriptors, grad_addresses = inputs.tables()
        grads = torch.from_numpy(grad_addresses.copy())
        for launch in self._launches:
            rows = descriptors[launch.tensors].copy()
            rows[:, FIELD["group"]] = launch.group_indices
            self._run(
                launch.descriptors.send(rows).view(rows.shape),
                launch.work_item_table.send(launch.work_items).view(launch.work_items.shape),
                grads[launch.tensors],
                torch.from_numpy(hyperparameters.values[launch.groups]),
                torch.from_numpy(hyperparameters.addresses[launch.groups]),
                launch.dtype,
                grad_scale,
                found_inf,
            )

    def _launch(self, rows: np.ndarray, tensors: slice, device: torch.device) -> _Launch:
        groups, group_indices = np.unique(rows[:, FIELD["group"]], return_inverse=True)
        dtypes = np.unique(rows[rows[:, FIELD["numel"]] > 0, FIELD["dtype"]])
        work_items = _work_items(rows, self.block_threads)
        return _Launch(
            tensors,
            groups,
            group_indices,
            DeviceTable(rows.size, device),
            work_items,
            DeviceTable(work_items.size, device),
            int(dtypes[0]) if len(dtypes) == 1 else _MIXED_DTYPES,
        )

    @staticmethod
    def _run(*arguments: object) -> None:
        torch.ops.czm_fused.launch_step_cuda.default(*arguments)


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
    for number in np.argsort(-rows[:, FIELD["filter_numel"]], kind="stable"):
        row = rows[number]
        if row[FIELD["numel"]] == 0:
            continue
        filter_numel = row[FIELD["filter_numel"]]
        # A plain tensor's last part, shorter than the others, may take other barriers than they do.
        team = block_threads if row[FIELD["numel"]] % filter_numel else _WARP
        while team < block_threads and team * held[row[FIELD["dtype"]]] < filter_numel:
            team *= 2
        teams = block_threads // team
        filters = -(-row[FIELD["numel"]] // filter_numel)
        first = np.arange(0, filters, teams)
        count = np.minimum(teams, filters - first)
        items.append(
            np.stack(np.broadcast_arrays(number, first, count, team), axis=1).astype(np.int64)
        )
    return np.concatenate(items)
