"""The step on CPU tensors, by the C++ kernel of `csrc/cpu/step.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from czm_fused.ops.step.descriptors import Hyperparameters
from czm_fused.ops.step.tensors import StepInputs, native_module

# Weights in a block of a tensor without filters: threads share a tensor by its blocks.
BLOCK_NUMEL = 16384


class CpuStep:
    """Runs the C++ kernel.

    Args:
        work: the units of work of the plan's descriptors.
    """

    unscales_grads = False

    def __init__(self, work: int) -> None:
        native = native_module()
        assert native is not None
        self._step = native.step
        self._work = work

    def __call__(
        self,
        inputs: StepInputs,
        hyperparameters: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if found_inf is not None and found_inf.item() != 0:
            return
        # In float32, as GradScaler keeps it, and as devices read it.
        scale = 1.0 if grad_scale is None else grad_scale.to(torch.float32).item()
        self._step(inputs.addresses, hyperparameters.value_bytes, self._work, 1.0 / scale)
