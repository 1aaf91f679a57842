"""Interleaved rounds, timed by the clock on a CPU and by events on a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

WARM_UP_ROUNDS = 2
COPY_BYTES = 2**28
# Long enough for the host to enqueue a step before the device begins with it.
_QUEUE_CYCLES = 2_000_000

Call = Callable[[], object]


class Timer(Protocol):
    """Runs a call and returns two times in microseconds.

    They are that of the work, and that until the call returned.
    """

    def __call__(self, call: Call) -> tuple[float, float]: ...


class ClockTimer:
    """Take the time by the clock, from the call until the device has done its work.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, call: Call) -> tuple[float, float]:
        self._synchronize()
        start = time.perf_counter_ns()
        call()
        returned = time.perf_counter_ns()
        self._synchronize()
        return (time.perf_counter_ns() - start) / 1e3, (returned - start) / 1e3


class EventTimer:
    """Take the device's time by CUDA events around the call, in the current stream.

    The device is kept busy before, so that the host has enqueued the work when the first event is
    reached: what is measured is the device, not the launches.

    Args:
        cold: fill the L2 cache with other data before every call.
    """

    def __init__(self, cold: bool) -> None:
        self._flushed: torch.Tensor | None = None
        if cold:
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._flushed = torch.empty(max(4 * size, 2**28), dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_QUEUE_CYCLES)
        if self._flushed is not None:
            self._flushed.zero_()
        start.record()
        begin = time.perf_counter_ns()
        call()
        returned = time.perf_counter_ns()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3, (returned - begin) / 1e3


def timers(device: torch.device) -> dict[str, Timer]:
    """Return the timers of a step, by the state of the cache in which each times it.

    A CPU's caches keep what the step before left in them, "warm"; a GPU's L2 is timed both so and
    "cold", flushed before every step.
    """
    if device.type == "cuda":
        return {"warm": EventTimer(cold=False), "cold": EventTimer(cold=True)}
    return {"warm": ClockTimer(device)}


def time_rounds(
    calls: Sequence[Call], timer: Timer, rounds: int, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Run every call once a round, each round beginning with another one.

    Drifts of the machine so meet all calls alike. Two rounds of warm-up are not counted.

    Args:
        calls: what is timed.
        timer: how.
        rounds: how many rounds at most.
        seconds: after how long no further round begins; one is always run.

    Returns:
        In microseconds, two arrays of shape `(rounds, calls)`: the time of the work, and until the
        call returned.
    """
    count = len(calls)
    times: list[list[tuple[float, float]]] = []
    collects = gc.isenabled()
    gc.disable()
    deadline = float("inf")
    try:
        for number in range(WARM_UP_ROUNDS + rounds):
            if number == WARM_UP_ROUNDS:
                deadline = time.perf_counter() + seconds
            elif time.perf_counter() >= deadline:
                break
            times.append([(0.0, 0.0)] * count)
            for offset in range(count):
                index = (number + offset) % count
                times[-1][index] = timer(calls[index])
    finally:
        if collects:
            gc.enable()
    found = np.array(times[WARM_UP_ROUNDS:]).reshape(-1, count, 2)
    return found[..., 0], found[..., 1]


def copy_bandwidth(device: torch.device, timer: Timer) -> np.ndarray:
    """Return the GB/s, read and written, of copies of a large tensor, timed as the steps are."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    done, _ = time_rounds([lambda: target.copy_(source)], timer, 10, 5.0)
    return 2 * COPY_BYTES / done[:, 0] / 1e3
