"""The CUDA step through its PTX: what `csrc/cuda/step.cu` does at a launch, interpreted."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from czm_fused.ops.step.cuda import CudaStep
from ptx import nvcc
from ptx.parsing import Kernel
from ptx.recorder import StepMemory

# As nvcc names them; the kernel of several dtypes has all.
_MANGLED = ("Jf", "Jd", "J13__nv_bfloat16", "J6__half", "Jfd13__nv_bfloat166__half")
# Of csrc/cuda/step_kernel.cuh.
FEW_WORDS, MANY_WORDS = (4096 - 40) // 8, (32764 - 40) // 8


class PtxCudaStep(StepMemory, CudaStep):
    """Runs the CUDA step's PTX over CPU tensors.

    Attributes:
        source: of the kernels, and the faults planted in it, as `nvcc.compiled` takes them.
        least_words: what the launch must have room for, at least.
    """

    source: ClassVar[tuple[Any, ...]] = (nvcc.STEP,)
    least_words: ClassVar[int] = 0

    @classmethod
    def kernel(cls, dtype: int, words: int) -> Kernel:
        """Return the kernel that `choose_kernel` of csrc/cuda/step_launch.h takes."""
        is_few = max(words, cls.least_words) <= FEW_WORDS and dtype >= 0
        room = FEW_WORDS if is_few else MANY_WORDS
        text = nvcc.compiled(*cls.source)
        return nvcc.kernel(text, f"step_kernelILi{room}E", f"E{_MANGLED[dtype]}EE")

    def _run(  # type: ignore[override]
        self,
        descriptors: Tensor,
        work_items: Tensor,
        grads: Tensor,
        groups: Tensor,
        group_addresses: Tensor,
        dtype: int,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        words = [groups.numpy().view(np.int64), group_addresses.numpy(), grads.numpy()]
        kernel = self.kernel(dtype, sum(word.size for word in words))
        scales = [0 if scale is None else scale.data_ptr() for scale in (grad_scale, found_inf)]
        head = [descriptors.data_ptr(), work_items.data_ptr(), *scales, len(groups)]
        # StepArguments of csrc/cuda/step_kernel.cuh.
        arguments = np.concatenate([np.array(head), *(word.ravel() for word in words)]).tobytes()
        tensors = {"descriptors": descriptors, "work_items": work_items}
        tensors |= {"grad_scale": grad_scale, "found_inf": found_inf}  # type: ignore[dict-item]
        self.recorder.launch(
            kernel,
            [arguments.ljust(kernel.param_bytes, b"\0")],
            tensors,
            self.block_threads,
            len(work_items),
        )
