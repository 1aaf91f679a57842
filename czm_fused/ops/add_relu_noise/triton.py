"""relu(x + residual) * u and its gradient, in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from czm_fused.ops.layout import to_contiguous_or_channels_last, to_layout_of
from czm_fused.ops.triton_utils import current, multiple, real_dtype

_BLOCK = 1024


@triton.jit
def _row(offsets, channels, spatial, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Where the noise of the elements at `offsets` is: sample * channels + channel."""
    if CHANNELS_LAST:
        channels = multiple(channels, VECTOR)
        return offsets // (channels * spatial) * channels + offsets % channels
    else:
        return offsets // multiple(spatial, VECTOR)


@triton.jit(do_not_specialize=["numel", "channels", "spatial"])
def _kernel(
    written, first, second, noise, numel, channels, spatial,
    BACKWARD: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the output, of x and the residual; or the gradient, of the output's and the output."""
    begin = tl.program_id(0).to(INDEX) * BLOCK
    if begin + BLOCK > numel:
        _elements(
            written, first, second, noise, begin, numel - begin, channels, spatial, BACKWARD,
            COMPUTE_DTYPE, CHANNELS_LAST, BLOCK, 1,
        )  # fmt: skip
    elif (channels if CHANNELS_LAST else spatial) % 4 == 0:
        _elements(
            written, first, second, noise, begin, BLOCK, channels, spatial, BACKWARD,
            COMPUTE_DTYPE, CHANNELS_LAST, BLOCK, 4,
        )  # fmt: skip
    else:
        _elements(
            written, first, second, noise, begin, BLOCK, channels, spatial, BACKWARD,
            COMPUTE_DTYPE, CHANNELS_LAST, BLOCK, 1,
        )  # fmt: skip


@triton.jit
def _elements(
    written, first, second, noise, begin, count, channels, spatial,
    BACKWARD: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write `count` elements; where the compiler knows that these are all, nothing is masked."""
    slots = tl.arange(0, BLOCK)
    offsets, mask = begin + slots, slots < count
    value = tl.load(first + offsets, mask=mask, other=0.0).to(COMPUTE_DTYPE)
    decides = value
    if second is not None:
        decides = tl.load(second + offsets, mask=mask, other=0.0).to(COMPUTE_DTYPE)
        if not BACKWARD:
            value += decides
    if noise is not None:
        row = _row(offsets, channels, spatial, CHANNELS_LAST, VECTOR)
        value *= tl.load(noise + row, mask=mask, other=0.0)
    # NaN and -0 pass, as in torch.relu.
    is_off = decides <= 0 if BACKWARD else value < 0
    value = tl.where(is_off, 0.0, value)
    tl.store(written + offsets, value.to(written.dtype.element_ty), mask=mask)


def add_relu_noise(x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
    """Compute the operator of `czm_fused.ops.add_relu_noise`."""
    x = to_contiguous_or_channels_last(x)
    if residual is not None:
        residual = to_layout_of(residual, x)
    output = torch.empty_like(x)
    _launch(output, x, residual, noise, backward=False)
    return output


def add_relu_noise_backward(grad: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    """Compute the gradient operator of `czm_fused.ops.add_relu_noise`."""
    output = to_contiguous_or_channels_last(output)
    grad_x = torch.empty_like(output)
    _launch(grad_x, to_layout_of(grad, output), output, noise, backward=True)
    return grad_x


def _launch(
    written: Tensor, first: Tensor, second: Tensor | None, noise: Tensor | None, *, backward: bool
) -> None:
    numel = written.numel()
    if numel == 0:
        return
    with current(written.device):
        _kernel[(triton.cdiv(numel, _BLOCK),)](
            written,
            first,
            second,
            None if noise is None else noise.contiguous(),
            numel,
            written.shape[1],
            math.prod(written.shape[2:]),
            BACKWARD=backward,
            COMPUTE_DTYPE=real_dtype(written.dtype),
            INDEX=tl.int32 if numel <= 2**31 - _BLOCK else tl.int64,
            CHANNELS_LAST=not written.is_contiguous(),
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
