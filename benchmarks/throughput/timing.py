"""Interleaved rounds, and the native launch of a step on its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UP_ROUNDS = 2
COPY_BYTES = 2**28
_PYTHON_TIME_SECONDS = 10.0


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return what waits until `device` has done its work; on a CPU, nothing."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def time_rounds(
    steps: Sequence[Callable[[], object]],
    synchronize: Callable[[], None],
    rounds: int,
    seconds: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Run every step once a round, each round beginning with another one.

    Args:
        steps: what is timed.
        synchronize: waits for the device.
        rounds: how many rounds at most.
        seconds: after how long no further round begins.

    Returns:
        In microseconds, `(rounds, steps)`: the time until the device was done, and until the call
        returned.
    """
    wall, host = [], []
    count = len(steps)
    deadline = None
    collects = gc.isenabled()
    gc.disable()
    try:
        for number in range(WARM_UP_ROUNDS + rounds):
            if number == WARM_UP_ROUNDS:
                deadline = time.perf_counter() + seconds
            elif deadline is not None and time.perf_counter() >= deadline:
                break
            wall.append([0.0] * count)
            host.append([0.0] * count)
            for offset in range(count):
                index = (number + offset) % count
                synchronize()
                start = time.perf_counter_ns()
                steps[index]()
                returned = time.perf_counter_ns()
                synchronize()
                wall[-1][index] = (time.perf_counter_ns() - start) / 1e3
                host[-1][index] = (returned - start) / 1e3
    finally:
        if collects:
            gc.enable()
    return np.array(wall[WARM_UP_ROUNDS:]), np.array(host[WARM_UP_ROUNDS:])


def python_time(
    step: Callable[[], object], synchronize: Callable[[], None], rounds: int
) -> dict[str, float]:
    """Time a `czm_fused` step and its native call alone, in turn.

    Returns:
        The medians, in microseconds, of the native call and of what the step takes beyond it; empty
        for a backend that does not make one native call a step.
    """
    with _LaunchRecorder() as recorder:
        step()
    if len(recorder.calls) != 1:
        return {}
    operator, arguments = recorder.calls[0]
    steps = [step, lambda: operator(*arguments)]
    _, host = time_rounds(steps, synchronize, rounds, _PYTHON_TIME_SECONDS)
    return {
        "launch_p50_us": float(np.median(host[:, 1])),
        "python_p50_us": float(np.median(host[:, 0] - host[:, 1])),
    }


class _LaunchRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        if operator.name().startswith("czm_fused::launch_step"):
            self.calls.append((operator, arguments))
        return operator(*arguments, **(keywords or {}))


def copy_bandwidth(device: torch.device) -> float:
    """Return the GB/s, read and written, at which a large tensor is copied on `device`."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wall, _ = time_rounds([lambda: target.copy_(source)], synchronizer(device), 10, 5.0)
    return 2 * COPY_BYTES / float(np.median(wall)) / 1e3
