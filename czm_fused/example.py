"""A forward pass on an example input that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from czm_fused.init import Convolution

SIZES = (32, 28, 64, 96, 224, 256, 299)
"""Lengths of the spatial dimensions to try where no example is given."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore on exit the modes, attributes and buffers of `model`, and torch's generators."""
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
        for module, training in modes.items():
            # What a class does on a change of its mode, it alone can undo: merge weights, as LoRA
            # does, or take another graph, as torchvision's feature extractors do.
            if type(module).train is not nn.Module.train and module.training != training:
                module.train(training)
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
                    # Observers of quantisation get their size in their first pass.
                    if buffer.shape != content.shape:
                        buffer.resize_as_(content)
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
    weight, channels = first.weight, first.in_channels
    shapes = ((1, channels, *[size] * (weight.dim() - 2)) for size in SIZES)
    zeros = (torch.zeros(each, dtype=weight.dtype, device=weight.device) for each in shapes)
    return first_that_runs(model, nn.Module.eval, zeros, f"zeros of {channels} channels")


def first_that_runs(
    model: nn.Module, prepare: Callable[[Any], object], examples: Iterable[Tensor], what: str
) -> Tensor:
    """Return the first of `examples` on which `model` runs.

    Args:
        model: the network.
        prepare: puts the network into the mode to run it in.
        examples: the inputs to try.
        what: the examples, in words.

    Raises:
        ValueError: the model runs on none of them.
    """
    error: Exception | None = None
    for example in examples:
        try:
            with preserved(model):
                prepare(model)
                run_example(model, example)
            return example
        except Exception as failure:
            error = error or failure
    raise ValueError(
        f"example_input must be given, as the model does not run on {what} "
        f"({type(error).__name__}: {error}); pass a batch of real inputs"
    ) from error


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove `hooks` on exit."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def run_example(model: nn.Module, example_input: Any) -> Any:
    """Return what `model` makes of `example_input`, without gradients.

    Args:
        model: the network, in the mode to run it in.
        example_input: a tensor, a tuple of positional or a dictionary of keyword arguments.
    """
    with torch.no_grad(), _weights_cast_anew():
        return call(model, example_input)


@contextmanager
def _weights_cast_anew() -> Iterator[None]:
    """Let autocast cast weights as they are now, and keep no cast of them."""
    # Its cache of casts would outlive the changes of weights around the passes, and in them.
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def run_checked(model: nn.Module, example_input: Any) -> Any:
    """Return what `run_example` does for a model in eval mode.

    Raises:
        ValueError: the model fails on the input.
    """
    try:
        return run_example(model, example_input)
    except Exception as error:
        raise ValueError(
            "example_input must be a batch that model takes in eval mode, but the model raised "
            f"{type(error).__name__}: {error}"
        ) from error


def call(model: nn.Module, example_input: Any) -> Any:
    """Return what `model` makes of `example_input`, as in `run_example`, with gradients if on."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, (tuple, list)):
        return model(*example_input)
    return model(example_input)
