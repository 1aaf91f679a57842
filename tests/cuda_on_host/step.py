"""The CUDA step on the host."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from cuda_on_host import build
from czm_fused.ops.step.cuda import MANY_WORDS, CudaStep, Launch, LaunchArguments


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

    def _run(self, launch: Launch, arguments: LaunchArguments) -> None:
        type(self).launches += 1
        self.kernels.launch_step(*arguments)

    def _is_capturing(self) -> bool:
        return False

    def _most_words(self) -> int:
        return MANY_WORDS
