"""A forward pass on an example input that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from czm_fused.init import Convolution

SIZES = (32, 28, 64, 96, 224, 256, 299)
"""Lengths of the spatial dimensions to try where no example is given."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore on exit the attributes and buffers of `model` and the state of torch's generators."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
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
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)
        # The attributes of scripted modules are not in their dictionaries.
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, version, content in buffers:
                module._buffers[name] = buffer
                # A write makes graphs stale that exist, so unchanged buffers are left alone. Batch
                # normalisation writes its running statistics without a new version.
                if buffer._version != version or not _same(buffer, content):
                    buffer.copy_(content)


def _same(buffer: Tensor, content: Tensor) -> bool:
    return buffer.is_meta or torch.equal(buffer, content)


def zeros_for(model: nn.Module, first: Convolution) -> Tensor:
    """Return an input of zeros, one sample, on which `model` runs in eval mode.

    Args:
        model: the network.
        first: the convolution that reads the input; it decides the channels, dtype and device.

    Raises:
        ValueError: the model runs on none of the sizes that are tried.
    """
    weight = first.weight
    error: Exception | None = None
    for size in SIZES:
        shape = (1, first.in_channels, *[size] * (weight.dim() - 2))
        example = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        try:
            with preserved(model):
                run_example(model.eval(), example)
            return example
        except Exception as failure:
            error = failure
    raise ValueError(
        f"example_input must be given, as the model does not run on zeros of {first.in_channels} "
        f"channels ({type(error).__name__}: {error}); pass a batch as the model takes it"
    ) from error


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
