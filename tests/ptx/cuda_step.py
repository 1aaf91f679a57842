"""The CUDA step through its PTX: what `csrc/cuda/step.cu` does at a launch, interpreted."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops.step.cuda import FEW_WORDS, MANY_WORDS, SIZES, CudaStep, Launch
from ptx import nvcc
from ptx.memory import Span
from ptx.parsing import Kernel
from ptx.recorder import StepMemory

# As nvcc names them.
_MANGLED = ("f", "d", "13__nv_bfloat16", "6__half")


class PtxCudaStep(StepMemory, CudaStep):
    """Runs the CUDA step's PTX over CPU tensors.

    Attributes:
        source: of the kernels, and the faults planted in it, as `nvcc.compiled` takes them.
        least_words: what the launch must have room for, at least.
    """

    source: ClassVar[tuple[Any, ...]] = (nvcc.STEP,)
    least_words: ClassVar[int] = 0

    @classmethod
    def kernel(cls, launch: Launch, words: int) -> Kernel:
        """Return the kernel that `choose_kernel` of csrc/cuda/step_launch.h takes."""
        is_few = max(words, cls.least_words) <= FEW_WORDS or launch.has_large_blocks
        room = FEW_WORDS if is_few else MANY_WORDS
        text = nvcc.compiled(*cls.source)
        block_size = f"LNS_9BlockSizeE{int(launch.has_large_blocks)}E"
        return nvcc.kernel(text, f"step_kernelILi{room}E{_MANGLED[launch.dtype]}{block_size}")

    def _run(
        self,
        launch: Launch,
        table: Tensor,
        grads: bytes,
        hyperparameters: bytes,
        hyperparameter_addresses: bytes,
        grad_scale: int,
        found_inf: int,
    ) -> None:
        for address, name in ((grad_scale, "grad_scale"), (found_inf, "found_inf")):
            if address and all(span.address != address for span in self.recorder.spans):
                self.recorder.spans.append(Span(address, torch.float32.itemsize, name))
        words = hyperparameters + hyperparameter_addresses + grads
        kernel = self.kernel(launch, len(words) // 8)
        # StepArguments of csrc/cuda/work_item.h.
        head = np.array([table.data_ptr(), grad_scale, found_inf, len(launch.groups)])
        size = SIZES[launch.dtype]
        threads = self.block_threads
        self.recorder.launch(
            kernel,
            [(head.tobytes() + words).ljust(kernel.param_bytes, b"\0")],
            {"work_items": table},
            threads,
            launch.blocks,
            # A number for each weight that a block holds, and two for each warp.
            (threads * size.held(launch.has_large_blocks) + 2 * threads // 32)
            * size.compute_itemsize,
        )

    def _is_capturing(self) -> bool:
        return False

    def _most_words(self) -> int:
        return MANY_WORDS
