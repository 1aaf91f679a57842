"""The fused step by Triton: what the kernel reads, kept on the device, and its launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters, StepTensor, build_descriptors
from czm_fused.ops.step.device_table import DeviceTable
from czm_fused.ops.step.spec import (
    DESCRIPTOR_FIELDS,
    FIELD,
    HYPERPARAMETER_NAMES,
    StepFlag,
)
from czm_fused.ops.step.tensors import StepInputs
from czm_fused.ops.step.triton_kernel import step_kernel
from czm_fused.ops.triton_utils import TRITON_DTYPES, current, real_dtype

# Weights in a block of a tensor without filters: enough for a program to be worth its start.
_BLOCK_NUMEL = 4096
# Offsets inside a filter and numbers of programs are int32, and reach a tile beyond their end.
_INT32_LIMIT = 2**31 - 2**16


class TritonStep:
    """Runs the Triton kernel over all tensors of a plan: one launch for each dtype among them, and
    one more where some tensors of a dtype have master weights and others not.

    Args:
        tensors: the parameters as planned, on one device; None for those not stepped.
        device: the device.

    Attributes:
        descriptors: the descriptors of all tensors, without addresses.

    Raises:
        ValueError: a tensor that is too large for the kernel.
    """

    def __init__(self, tensors: Sequence[StepTensor | None], device: torch.device) -> None:
        self.descriptors, _ = build_descriptors(tensors, _BLOCK_NUMEL)
        numbers_of: dict[tuple[torch.dtype, bool], list[int]] = {}
        for number, tensor in enumerate(tensors):
            if tensor is not None and self.descriptors[number, FIELD["numel"]] > 0:
                variant = tensor.dtype, bool(tensor.flags & StepFlag.MASTER_WEIGHTS)
                numbers_of.setdefault(variant, []).append(number)
        self._launches = [
            _Launch(self.descriptors, numbers, dtype, split, device)
            for (dtype, split), numbers in numbers_of.items()
        ]

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        descriptors, grads = inputs.tables()
        for launch in self._launches:
            launch(descriptors, grads, hyperparameters, grad_scale, found_inf)


class _Launch:
    """The launch over tensors of one dtype, all with remainders or none: `numbers` of the plan."""

    def __init__(
        self,
        descriptors: np.ndarray,
        numbers: Sequence[int],
        dtype: torch.dtype,
        split: bool,
        device: torch.device,
    ) -> None:
        self._device, self._dtype, self._split = device, dtype, split
        # Longer programs start first, so that short ones fill the processors up at the end.
        self._numbers = np.array(
            sorted(numbers, key=lambda number: -descriptors[number, FIELD["filter_numel"]])
        )
        self._first_filters, program_rows = _schedule(descriptors[self._numbers])
        self._program_rows = torch.from_numpy(program_rows).to(device)
        self._groups = 1 + int(descriptors[self._numbers, FIELD["group"]].max())
        self._descriptors = DeviceTable(len(numbers) * len(DESCRIPTOR_FIELDS), device)
        self._arguments = DeviceTable(
            len(numbers) + 2 * self._groups * len(HYPERPARAMETER_NAMES), device
        )
        program_numel = descriptors[self._numbers, FIELD["numel"]].sum() / len(program_rows)
        self._num_warps, self._tile = launch_shape(program_numel, dtype, split)

    def __call__(
        self,
        descriptors: np.ndarray,
        grads: np.ndarray,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        rows = descriptors[self._numbers]
        rows[:, FIELD["first_filter"]] = self._first_filters
        words = [grads[self._numbers], hyperparameters.addresses[: self._groups].ravel()]
        # float64 stays out of a float32 kernel, since not every device has it.
        real = np.float64 if self._dtype == torch.float64 else np.float32
        values = np.zeros(words[1].size, dtype=np.int64)
        values.view(real)[: values.size] = hyperparameters.values[: self._groups].ravel()
        arguments = np.concatenate([*words, values])
        with current(self._device):
            step_kernel[(len(self._program_rows),)](
                self._descriptors.send(rows),
                self._program_rows,
                self._arguments.send(arguments),
                len(self._numbers),
                self._groups,
                grad_scale,
                found_inf,
                DTYPE=TRITON_DTYPES[self._dtype],
                REAL=real_dtype(self._dtype),
                SPLIT=self._split,
                TILE=self._tile,
                num_warps=self._num_warps,
                enable_fp_fusion=False,
            )


def _schedule(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first filter of each row, and the row of each program.

    Raises:
        ValueError: more weights or filters than the kernel can count.
    """
    filter_numel = rows[:, FIELD["filter_numel"]]
    programs = -(-rows[:, FIELD["numel"]] // filter_numel)
    if filter_numel[0] > _INT32_LIMIT or programs.sum() > _INT32_LIMIT:
        raise ValueError(
            f"the triton backend takes filters of at most {_INT32_LIMIT} weights and as many "
            f"filters, but has one of {filter_numel[0]} among {programs.sum()}; use "
            "backend='reference'"
        )
    first_filters = np.cumsum(programs) - programs
    return first_filters, np.repeat(np.arange(len(rows), dtype=np.int32), programs)


def launch_shape(program_numel: float, dtype: torch.dtype, split: bool) -> tuple[int, int]:
    """Return the warps of a program, and the weights in its registers at a time.

    Short programs are bound by latency, and more of them fit a processor with fewer warps each.
    """
    num_warps = 2 if program_numel <= 512 else 4
    # 32 threads a warp, each with at least 16 bytes of every tensor, a split one's halves together.
    itemsize = 4 if split else dtype.itemsize
    return num_warps, 32 * num_warps * max(4, 16 // itemsize)
