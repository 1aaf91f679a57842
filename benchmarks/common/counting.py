"""Counts, which a busy machine does not change: bytes, operators, launches and collectives."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import czm_fused.functional  # noqa: F401  (defines the operator that is named below)

aten = torch.ops.aten

# The arguments of an operator with weights that its gradients need.
_FACTORS = {
    aten.convolution.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
}
_RELUS = (
    aten.relu.default,
    aten.relu_.default,
    torch.ops.czm_fused.add_relu_noise.default,
)


class _Storages:
    """Distinct storages, kept alive, so that no other takes the address of one of them."""

    def __init__(self, excluded: list[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = storage

    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes that a forward pass keeps for backward, each storage counted once.

    Parameters, buffers and the images exist anyway and are not counted.
    """
    kept = _Storages([*model.parameters(), *model.buffers(), images])

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result keeps the graph alive until everything has been counted.
        result = model(images)
        total = kept.nbytes()
    del result
    return total


def floor_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes that the architecture makes any eager training keep for backward.

    They are the activations that a convolution or a linear layer takes, for the gradients of their
    weights, and those that a ReLU returns, for its mask; each once, as most are both, and the
    images not at all. Under autocast, images and weights in its dtype are copies, and count. The
    factors of the noise, the indices of a max-pooling and all statistics are above the floor. They
    are read off the operators of a forward pass, not off what autograd keeps.

    Args:
        model: the network without normalisation or noise.
        images: of the shape to train with, on the device of the model.
    """
    kept = _Storages([*model.parameters(), images])
    with torch.no_grad(), _ArchitectureMode(kept):
        model(images)
    return kept.nbytes()


class _ArchitectureMode(TorchDispatchMode):
    def __init__(self, kept: _Storages) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        result = operator(*arguments, **(keywords or {}))
        for index in _FACTORS.get(operator, ()):
            self._kept.add(arguments[index])
        if operator in _RELUS:
            self._kept.add(result)
        return result


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most that a call has allocated at once beyond what was there before.

    From torch's allocator: on a GPU its own statistics, on a CPU the profiler's record of every
    allocation. Memory that libraries allocate by themselves (oneDNN's scratch) is not included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as run:
        call()
    assert run.profiler is not None and run.profiler.kineto_results is not None
    # In order of time: the profiler's own sums omit what an operator has counted already.
    events = [each for each in run.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = sorted((each.start_ns(), each.nbytes()) for each in events)
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def operators(function: Callable[[], object]) -> int:
    """Return how many operators torch dispatches while `function` runs.

    Views and bare allocations, which touch no element, are not counted.
    """
    with _CountingMode() as mode:
        function()
    return mode.count


class _CountingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        self.count += _touches_elements(operator)
        return operator(*arguments, **(keywords or {}))


def _touches_elements(operator: Any) -> bool:
    arguments = operator._schema.arguments
    is_view = any(each.alias_info and not each.alias_info.is_write for each in arguments)
    return not is_view and operator.overloadpacket is not aten.empty


def device_work(step: Callable[[], object], steps: int = 10) -> dict[str, float]:
    """Return what a GPU did in a step, as the profiler saw it.

    Kernels count as launches; copies and fills are counted apart.

    Args:
        step: is run `steps` times.
        steps: of which the mean is taken.

    Returns:
        The device's time in microseconds, `profiled`, and the numbers of `launches` and `copies`.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event["dur"] for event in events if event.get("cat") == "kernel"]
    copies = [
        event["dur"] for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")
    ]
    return {
        "profiled": (sum(kernels) + sum(copies)) / steps,
        "launches": len(kernels) / steps,
        "copies": len(copies) / steps,
    }
