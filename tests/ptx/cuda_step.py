"""The CUDA step through its PTX: what `csrc/cuda/step.cu` does at a launch, interpreted."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from czm_fused.ops.step.cuda import FEW_WORDS, MANY_WORDS, SIZES, CudaStep, Launch, LaunchArguments
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
    def kernel(cls, arguments: LaunchArguments, words: int) -> Kernel:
        """Return the kernel that `choose_kernel` of csrc/cuda/step_launch.h takes."""
        is_few = max(words, cls.least_words) <= FEW_WORDS or arguments.has_large_blocks
        room = FEW_WORDS if is_few else MANY_WORDS
        text = nvcc.compiled(*cls.source)
        block_size = f"LNS_9BlockSizeE{int(arguments.has_large_blocks)}E"
        return nvcc.kernel(text, f"step_kernelILi{room}E{_MANGLED[arguments.dtype]}{block_size}")

    def _run(self, launch: Launch, arguments: LaunchArguments) -> None:
        for name in ("grad_scale", "found_inf"):
            address = getattr(arguments, name)
            if address and all(span.address != address for span in self.recorder.spans):
                self.recorder.spans.append(Span(address, torch.float32.itemsize, name))
        words = arguments.hyperparameters + arguments.hyperparameter_addresses + arguments.grads
        kernel = self.kernel(arguments, len(words) // 8)
        # StepArguments of csrc/cuda/work_item.h.
        head = np.array(
            [arguments.items, arguments.grad_scale, arguments.found_inf, arguments.groups]
        )
        size = SIZES[arguments.dtype]
        threads = self.block_threads
        self.recorder.launch(
            kernel,
            [(head.tobytes() + words).ljust(kernel.param_bytes, b"\0")],
            {"work_items": launch.table.send(launch.words)},
            threads,
            arguments.blocks,
            # A number for each weight that a block holds, and three sums of each warp.
            (threads * size.held(arguments.has_large_blocks) + 3 * threads // 32)
            * size.compute_itemsize,
        )

    def _is_capturing(self) -> bool:
        return False

    def _most_words(self) -> int:
        return MANY_WORDS
