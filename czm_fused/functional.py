"""Functions of the forward pass that keep no more for backward than they must."""

from __future__ import annotations

import torch
from torch import Tensor

from czm_fused.ops import add_relu_noise as ops


def add_relu_noise(
    x: Tensor,
    residual: Tensor | None = None,
    amplitude: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Compute the tail of a residual unit, relu(x + residual) * u, in one pass over memory.

    u is drawn from U(1 - amplitude, 1 + amplitude) with torch's generator, once for each sample and
    channel: the noise on the input of the next unit (paper section 4.4). Backward needs the output,
    which the next convolution keeps anyway, and u, and nothing else: as u > 0, the sign of the
    output is the mask of the ReLU.

    `torch.fx` records the call. `torch.jit.script` does not take it; it takes `CZMBasicBlock`.

    Args:
        x: the activation, of shape (N, C, ...) and of any floating-point dtype and layout. The
            result is contiguous or channels-last, as `x` is, and contiguous otherwise.
        residual: what the shortcut adds, of the same shape and device as `x`, or None. Different
            dtypes are promoted as `x + residual` does.
        amplitude: half the width of the noise, in [0, 1). 0 turns it off.
        training: False turns the noise off.

    Raises:
        TypeError: `x` or `residual` is not floating-point.
        ValueError: `amplitude` is outside [0, 1), `x` has fewer than two dimensions, or `residual`
            has another shape or device than `x`.
    """
    # torch.fx replaces the names of this module alone, not those that others imported from it.
    return _add_relu_noise(x, residual, amplitude, training)


def _add_relu_noise(x: Tensor, residual: Tensor | None, amplitude: float, training: bool) -> Tensor:
    check_amplitude("amplitude", amplitude)
    if x.dim() < 2:
        raise ValueError(f"x must have the dimensions (N, C, ...), but its shape was {_shape(x)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, but its dtype was {x.dtype}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x, {_shape(x)}, but had {_shape(residual)}"
            )
        if residual.device != x.device:
            raise ValueError(
                f"residual must be on the device of x, {x.device}, but was on {residual.device}"
            )
        if residual.dtype != x.dtype:
            x, residual = _promote(x, residual)
    noise = draw_noise(x, amplitude) if training and amplitude > 0 else None
    result: Tensor = ops.add_relu_noise(x, residual, noise)
    return result


torch.fx.wrap("_add_relu_noise")


def check_amplitude(name: str, amplitude: float) -> None:
    """Raise a ValueError unless `amplitude`, the argument `name`, is in [0, 1)."""
    if not 0.0 <= amplitude < 1.0:
        raise ValueError(f"{name} must be in [0, 1), but was {amplitude}")


def draw_noise(x: Tensor, amplitude: float) -> Tensor:
    """Draw u ~ U(1 - amplitude, 1 + amplitude) of shape (N, C) for the activation `x`.

    Its dtype is float64 where `x` is, else float32; it comes from torch's generator for the device,
    so that `torch.manual_seed`, activation checkpointing and CUDA graphs treat it as they should.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    noise = torch.empty(x.shape[:2], device=x.device, dtype=dtype)
    return noise.uniform_(1 - amplitude, 1 + amplitude)


def _promote(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    if not residual.is_floating_point():
        raise TypeError(f"residual must be floating-point, but its dtype was {residual.dtype}")
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
