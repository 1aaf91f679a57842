"""The fused step by Triton: what the kernel reads, kept on the device, and its launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.table import COLUMN, GROUP_COLUMNS, HyperParameters, StepEntry, build_table
from czm_fused.ops.triton.step_kernel import step_kernel
from czm_fused.ops.triton_utils import TRITON_DTYPES, current, real_dtype

# Enough weights of a plain tensor for a program to be worth its start.
_PLAIN_BLOCK = 4096
# Offsets inside a filter and numbers of programs are int32, and reach a tile beyond their end.
_INT32_LIMIT = 2**31 - 2**16


class TritonStep:
    """Runs the Triton kernel over all tensors of a plan: one launch for each dtype among them, and
    one more where some tensors of a dtype have master weights and others not.

    Args:
        entries: the tensors and their state, on one device.

    Raises:
        ValueError: a tensor whose memory the kernel cannot walk, or too large a one.
    """

    # A CUDA graph goes on reading the tables that it was captured with, and nothing tells when it
    # is gone.
    _captured: ClassVar[set[TritonStep]] = set()

    def __init__(self, entries: Sequence[StepEntry]) -> None:
        self._device = entries[0].param.device
        numbers_of: dict[tuple[torch.dtype, bool], list[int]] = {}
        for number, entry in enumerate(entries):
            if entry.param.numel() > 0:
                variant = entry.param.dtype, entry.param_remainder is not None
                numbers_of.setdefault(variant, []).append(number)
        self._launches = [
            _Launch([entries[number] for number in numbers], numbers)
            for numbers in numbers_of.values()
        ]

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
        for launch in self._launches:
            launch(grad_addresses, hyper_parameters, grad_scale, found_inf)

    def _is_capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Launch:
    """The launch over tensors of one dtype, all with remainders or none: `numbers` of the plan."""

    def __init__(self, entries: Sequence[StepEntry], numbers: Sequence[int]) -> None:
        param = entries[0].param
        self._device, self._dtype = param.device, param.dtype
        self._split = entries[0].param_remainder is not None
        table, order, program_rows = _schedule(entries)
        self._numbers = [numbers[position] for position in order]
        self._grid = (len(program_rows),)
        self._rows = torch.from_numpy(table).to(self._device)
        self._program_rows = torch.from_numpy(program_rows).to(self._device)
        self._groups = 1 + max(entry.group for entry in entries)
        self._arguments = _Arguments(
            len(entries) + 2 * self._groups * len(GROUP_COLUMNS), self._device
        )
        self._num_warps, self._tile = launch_shape(
            table[:, COLUMN["numel"]].sum() / len(program_rows), self._dtype, self._split
        )

    def __call__(
        self,
        grad_addresses: Tensor,
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        rows, groups = len(self._numbers), self._groups
        words = np.zeros(rows + 2 * groups * len(GROUP_COLUMNS), dtype=np.int64)
        words[:rows] = grad_addresses.numpy()[self._numbers]
        addresses, values = np.split(words[rows:], 2)
        addresses[:] = hyper_parameters.addresses.numpy()[:groups].ravel()
        # float64 stays out of a float32 kernel, since not every device has it.
        real = np.float64 if self._dtype == torch.float64 else np.float32
        values.view(real)[: values.size] = hyper_parameters.values.numpy()[:groups].ravel()
        with current(self._device):
            step_kernel[self._grid](
                self._rows,
                self._program_rows,
                self._arguments.send(words),
                rows,
                groups,
                grad_scale,
                found_inf,
                DTYPE=TRITON_DTYPES[self._dtype],
                REAL=real_dtype(self._dtype),
                SPLIT=self._split,
                TILE=self._tile,
                num_warps=self._num_warps,
                enable_fp_fusion=False,
            )


def _schedule(entries: Sequence[StepEntry]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the table, the entries in the order of its rows, and the row of each program.

    Longer programs start first, so that short ones fill the processors up at the end.
    """
    table = build_table(entries, _PLAIN_BLOCK)[0].numpy()
    filter_numel = table[:, COLUMN["filter_numel"]]
    order = np.argsort(-filter_numel, kind="stable")
    table = np.ascontiguousarray(table[order])
    filter_numel = table[:, COLUMN["filter_numel"]]
    programs = -(-table[:, COLUMN["numel"]] // filter_numel)
    if filter_numel[0] > _INT32_LIMIT or programs.sum() > _INT32_LIMIT:
        raise ValueError(
            f"the triton backend takes filters of at most {_INT32_LIMIT} weights and as many "
            f"filters, but has one of {filter_numel[0]} among {programs.sum()}; use "
            "backend='reference'"
        )
    table[:, COLUMN["first_filter"]] = np.cumsum(programs) - programs
    return table, order, np.repeat(np.arange(len(table), dtype=np.int32), programs)


def launch_shape(program_numel: float, dtype: torch.dtype, split: bool) -> tuple[int, int]:
    """Return the warps of a program, and the weights in its registers at a time.

    Short programs are bound by latency, and more of them fit a processor with fewer warps each.
    """
    num_warps = 2 if program_numel <= 512 else 4
    # 32 threads a warp, each with at least 16 bytes of every tensor, a split one's halves together.
    itemsize = 4 if split else dtype.itemsize
    return num_warps, 32 * num_warps * max(4, 16 // itemsize)


class _Arguments:
    """What may change from step to step: sent to the device when it did, and never waited for."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._size = size
        self._words = torch.empty(size, dtype=torch.int64, device=device)
        self._sent: np.ndarray | None = None
        # Every replay of a captured step reads the words of its capture, out of buffers of its own.
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._reserved: tuple[Tensor, Tensor] | None = None

    def send(self, words: np.ndarray) -> Tensor:
        """Return a tensor on the device that will hold `words`, int64, when a kernel reads it."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            host, words_on_device = self._reserved or self._reserve()
            self._reserved = None
            self._captured.append((host, words_on_device))
            host.numpy()[:] = words
            return words_on_device.copy_(host, non_blocking=True)
        if self._reserved is None and self._device.type == "cuda":
            self._reserved = self._reserve()
        if self._sent is None or not np.array_equal(words, self._sent):
            # A fresh one each time: the copy may still be reading the last.
            host = self._pinned()
            host.numpy()[:] = words
            self._words.copy_(host, non_blocking=True)
            self._sent = words
        return self._words

    def _reserve(self) -> tuple[Tensor, Tensor]:
        return self._pinned(), torch.empty_like(self._words)

    def _pinned(self) -> Tensor:
        return torch.empty(self._size, dtype=torch.int64, pin_memory=self._device.type != "cpu")
