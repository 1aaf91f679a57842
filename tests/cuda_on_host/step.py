"""The CUDA step on the host."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from torch import Tensor

from cuda_on_host import build
from czm_fused.ops.step.cuda import CudaStep


class HostStep(CudaStep):
    """Runs the CUDA kernel's source over CPU tensors.

    Attributes:
        kernels: what `build.load` returned.
        launches: how many there were.
    """

    kernels: ClassVar[ModuleType]
    block_threads: ClassVar[int] = build.SMALL_BLOCK
    launches: ClassVar[int] = 0

    @classmethod
    def with_kernels(cls, kernels: ModuleType) -> type[HostStep]:
        """Return a class of its own for these kernels."""
        threads = kernels.block_threads
        members = {"kernels": kernels, "block_threads": threads, "launches": 0}
        return type(cls.__name__, (cls,), members)

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
        type(self).launches += 1
        self.kernels.launch_step(
            descriptors.data_ptr(),
            work_items.data_ptr(),
            len(work_items),
            grads.data_ptr(),
            len(grads),
            groups.data_ptr(),
            group_addresses.data_ptr(),
            len(groups),
            dtype,
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
        )
