"""A forward pass on an example input that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore on exit the modes and buffers of `model` and the state of torch's generators."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    accelerators = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    device_type = next(iter(accelerators)).type if accelerators else "cuda"
    try:
        with torch.random.fork_rng(accelerators, device_type=device_type):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, version, content in buffers:
                module._buffers[name] = buffer
                # A write makes graphs stale that exist, so unchanged buffers are left alone. Batch
                # normalisation writes its running statistics without a new version.
                if buffer._version != version or not _same(buffer, content):
                    buffer.copy_(content)


def _same(buffer: torch.Tensor, content: torch.Tensor) -> bool:
    return buffer.is_meta or torch.equal(buffer, content)


def run_example(model: nn.Module, example_input: Any) -> Any:
    """Return what `model` makes of `example_input`, without gradients.

    Args:
        model: the network, in the mode to run it in.
        example_input: a tensor, a tuple of positional or a dictionary of keyword arguments.
    """
    args: tuple[Any, ...] = (example_input,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        args, kwargs = (), dict(example_input)
    elif isinstance(example_input, (tuple, list)):
        args = tuple(example_input)
    with torch.no_grad():
        return model(*args, **kwargs)
