"""torch's default generators, lent to one training among several in a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def draws_from(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from torch's default generator draw from `generator` instead.

    The default generator of `generator`'s device takes its place inside, and is afterwards as it
    was before; `generator` goes on from the last draw.
    """
    device = generator.device
    if device.type == "cuda":
        # The two share one state: a CUDA graph keeps hold of the state that it was captured with.
        default = torch.cuda.default_generators[device.index]
        outer = default.graphsafe_get_state()
        default.graphsafe_set_state(generator)
        try:
            yield
        finally:
            default.graphsafe_set_state(outer)
        return
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    state = module.get_rng_state()
    module.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(module.get_rng_state())
        module.set_rng_state(state)
