"""Where a GPU's time goes in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from throughput import cuda

MOST_KERNELS = 12


def breakdown(epoch: Callable[[], object], steps: int) -> dict[str, Any]:
    """Return a step's time on the device, its launches, and the kernels that take most of it.

    Args:
        epoch: runs some steps.
        steps: how many.
    """
    work = {name: value / steps for name, value in cuda.device_work(epoch, 1).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        epoch()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    total = sum(event.device_time_total for event in events)
    events.sort(key=lambda event: event.device_time_total, reverse=True)
    shares = {event.key: event.device_time_total / total for event in events[:MOST_KERNELS]}
    return {**work, "kernel_shares": shares}
