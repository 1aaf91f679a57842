"""The peak memory of a step, and the largest batch that a memory holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .training import Training


def peak_bytes(training: Training) -> int:
    """Return the most that a whole step has allocated at once, its network and optimizer included.

    Of torch's allocator: on a GPU its own statistics, on a CPU the sum of what the profiler sees it
    allocate and free. What libraries allocate by themselves (oneDNN's scratch) is not seen. What
    others keep, and the images, are not counted.
    """
    device = training.images.device
    grown = _grown_on_cuda(training.step) if device.type == "cuda" else _grown_on_cpu(training.step)
    return grown + sum(tensor.nbytes for tensor in _kept(training))


def _kept(training: Training) -> Iterator[Tensor]:
    yield from training.model.parameters()
    yield from training.model.buffers()
    for state in training.optimizer.state.values():
        yield from (each for each in state.values() if isinstance(each, Tensor))


def _grown_on_cuda(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _grown_on_cpu(step: Callable[[], None]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as run:
        step()
    assert run.profiler is not None and run.profiler.kineto_results is not None
    changes = [each for each in run.profiler.kineto_results.events() if each.name() == "[memory]"]
    total = most = 0
    for change in sorted(changes, key=lambda each: each.start_ns()):
        total += change.nbytes()
        most = max(most, total)
    return most


def largest_batch(make: Callable[[int], Training], nbytes: int) -> int:
    """Return the most images a step for which a GPU's memory of `nbytes` suffices; 0 for none.

    Args:
        make: makes a training of so many images a step.
        nbytes: what torch's allocator may reserve. Nothing else of torch's may be on the GPU.
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
    try:
        # BatchNorm needs two images; the doubling ends, as memory does.
        fits, fails = 0, 2
        while _runs(make, fails):
            fits, fails = fails, 2 * fails
        while fails - fits > max(1, fits // 100):
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if _runs(make, middle) else (fits, middle)
        return fits
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _runs(make: Callable[[int], Training], batch: int) -> bool:
    try:
        _two_steps(make, batch)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _two_steps(make: Callable[[int], Training], batch: int) -> None:
    training = make(batch)
    # The optimizer's state comes with the first step, and stays during the second.
    training.step()
    training.step()
    torch.cuda.synchronize()
