"""Measure the signals of a convolution in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from czm_fused.ops.step.spec import compute_dtype


@dataclass
class Signals:
    """The signals of one convolution in a forward pass, over all its runs but those on nothing."""

    powers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)

    def enter(self, convolution: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the input, as a forward pre-hook with keyword arguments."""
        x = input_of(args, kwargs)
        if x.numel() == 0:
            return
        # A convolution also takes an image without the batch's dimension.
        space = tuple(range(2 - convolution.weight.dim(), 0))
        dtype = compute_dtype(x.dtype)
        signal = x.to(dtype) - x.to(dtype).mean(dim=space, keepdim=True)
        signal = signal.to(x.dtype)
        response = convolution._conv_forward(signal, convolution.weight, None)
        self.powers.append((_mean_square(signal), _mean_square(response)))

    def leave(self, convolution: Any, _: Any, output: Tensor) -> None:
        """Record the output, as a forward hook."""
        if output.numel() == 0:
            return
        batched = output if output.dim() == convolution.weight.dim() else output.unsqueeze(0)
        channels = batched.to(compute_dtype(output.dtype)).transpose(0, 1)
        self.variances.append(_variance(channels))

    def gain(self) -> float | None:
        """Return the root mean square of the responses over that of the zero-mean inputs."""
        if not self.powers:
            return None
        given, returned = (torch.stack(p).sum() for p in zip(*self.powers, strict=True))
        return None if given == 0 else (returned / given).sqrt().item()

    def output_spread(self) -> float | None:
        """Return the spread of the outputs, or None if there was none."""
        return torch.stack(self.variances).mean().sqrt().item() if self.variances else None


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a convolution from the arguments that it was called with."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def _variance(channels: Tensor) -> Tensor:
    """Return the variance over all dimensions but the first, averaged over that."""
    return channels.flatten(1).var(dim=1, correction=0).mean()


def spread(x: Tensor) -> float:
    """Return the standard deviation over samples and positions, the root mean square over channels.

    0 where that is no more than the rounding of a constant.

    Args:
        x: of shape (samples, channels, ...), or (samples,).
    """
    x = x.detach().to(compute_dtype(x.dtype))
    channels = (x if x.dim() > 1 else x.unsqueeze(1)).transpose(0, 1)
    deviation = _variance(channels).sqrt().item()
    rounding = 4 * torch.finfo(x.dtype).eps * channels.square().mean().sqrt().item()
    return 0.0 if deviation < rounding else deviation


def output_spread(output: Any) -> float | None:
    """Return the spread of the first tensor in `output` that can have one, or None without one."""
    measured = first_floating_point(output)
    return None if measured is None else spread(measured)


def first_floating_point(output: Any) -> Tensor | None:
    """Return the first floating-point tensor in `output` with a dimension and an element, if any.

    Args:
        output: what a model returned.
    """
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() and leaf.numel():
            return leaf
    return None


def is_empty(output: Any) -> bool:
    """Return True if what a model returned holds nothing but tensors without elements, if those."""
    return all(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in tree_leaves(output))


def _mean_square(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)).square().mean()
