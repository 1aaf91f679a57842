"""What interpreted launches may touch, and a record of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx import instructions
from ptx.execution import Launch
from ptx.memory import Memory, Span
from ptx.parsing import Kernel, Trap

__all__ = ["instructions"]


def span_of(tensor: Tensor, name: str) -> Span:
    """Return the memory of a dense tensor."""
    return Span(tensor.data_ptr(), tensor.numel() * tensor.element_size(), name)


class Recorder:
    """Runs launches over CPU tensors, and keeps them.

    Args:
        change: takes each kernel and returns what to run in its place.
        options: of each `Launch`.

    Attributes:
        spans: what launches may touch beside their own arguments.
        launches: that were made.
    """

    def __init__(self, change: Callable[[Kernel], Kernel] | None = None, **options: Any) -> None:
        self.change, self.options = change, options
        self.spans: list[Span] = []
        self.launches: list[Launch] = []

    def launch(
        self,
        kernel: Kernel,
        values: Sequence[int | bytes],
        tensors: Mapping[str, Tensor | None],
        threads: int,
        grid: int,
        dynamic_shared: int = 0,
    ) -> None:
        """Run a launch.

        Args:
            kernel: what to run.
            values: of its parameters; those that are missing are 0.
            tensors: what it may touch, by name.
            threads: of a block.
            grid: the number of blocks.
            dynamic_shared: bytes of shared memory beside those that the kernel declares.
        """
        if self.change is not None:
            kernel = self.change(kernel)
        params = bytearray(kernel.param_bytes)
        if len(values) > len(kernel.params):
            raise Trap(f"{kernel.name} has {len(kernel.params)} parameters, not {len(values)}")
        for value, (offset, size) in zip(values, kernel.params.values(), strict=False):
            raw = value if isinstance(value, bytes) else (value % 2**64).to_bytes(8, "little")
            if isinstance(value, bytes) and len(value) != size:
                raise Trap(f"a parameter of {kernel.name} has {size} bytes, not {len(value)}")
            params[offset : offset + size] = raw[:size]
        spans = [span_of(each, name) for name, each in tensors.items() if each is not None]
        memory = Memory([*self.spans, *spans])
        self.launches.append(
            Launch(
                kernel, memory, bytes(params), threads, grid,
                dynamic_shared=dynamic_shared, **self.options,
            )
        )  # fmt: skip

    def check_written_once(self, tensor: Tensor, what: str) -> None:
        """Trap unless the launches wrote every element of `tensor` once."""
        # Launches may count in granules of several sizes.
        counts = [
            launch.writes_of(number)
            for launch in self.launches
            for number, span in enumerate(launch.memory.spans)
            if span.address == tensor.data_ptr()
        ]
        least, most = (sum(int(limit(each)) for each in counts) for limit in (np.min, np.max))
        if tensor.numel() and (least, most) != (1, 1):
            raise Trap(f"{what} of shape {tuple(tensor.shape)} is not written once")


class StepMemory:
    """A step on CPU tensors whose launches go to a recorder; to be put before a step's class.

    Attributes:
        recorder: of its launches.
    """

    recorder: Recorder
    descriptors: Any

    def __call__(
        self, inputs: Any, hyperparameters: Any, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        recorder = self.recorder
        recorder.launches.clear()
        recorder.spans = [
            Span(address, torch.float32.itemsize, "hyperparameter")
            for address in hyperparameters.addresses.ravel().tolist()
        ]
        stepped = []
        for param, grad, state in zip(inputs.params, inputs.grads, inputs.states, strict=True):
            if grad is None:
                continue
            tensors = {**(state or {}), "param": param, "grad": grad}
            stepped.append(tensors)
            recorder.spans += [span_of(tensor, name) for name, tensor in tensors.items()]
        super().__call__(inputs, hyperparameters, grad_scale, found_inf)  # type: ignore[misc]
        if (found_inf is None or not found_inf.item()) and "blocks" not in recorder.options:
            for tensors in stepped:
                for name in ("param", "momentum_buffer", "param_remainder"):
                    if name in tensors:
                        recorder.check_written_once(tensors[name], name)
