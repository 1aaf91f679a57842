"""W[f] = exp(g[f]) * V[f] and its gradient, in Triton: one program a filter."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from czm_fused.ops.layout import to_contiguous_or_channels_last, to_layout_of
from czm_fused.ops.triton_utils import current, multiple, read, real_dtype

_TILE = 512


@triton.jit(do_not_specialize=["filter_numel"])
def _forward_kernel(
    weight, direction, log_scale, filter_numel, COMPUTE_DTYPE: tl.constexpr, TILE: tl.constexpr
):
    number = tl.program_id(0)
    scale = tl.exp(tl.load(log_scale + number).to(COMPUTE_DTYPE))
    VECTOR: tl.constexpr = 128 // direction.dtype.element_ty.primitive_bitwidth
    if filter_numel % VECTOR == 0:
        _forward(weight, direction, scale, number, filter_numel, TILE, VECTOR)
    else:
        _forward(weight, direction, scale, number, filter_numel, TILE, 1)


@triton.jit
def _forward(
    weight, direction, scale, number, filter_numel, TILE: tl.constexpr, VECTOR: tl.constexpr
):
    end = multiple(filter_numel, VECTOR)
    begin = number.to(tl.int64) * end
    tile = number * 0
    while tile * TILE < end:
        offsets = tile * TILE + tl.arange(0, TILE)
        mask = offsets < end
        v = read(direction + begin, offsets, mask, VECTOR).to(scale.dtype)
        tl.store(weight + begin + offsets, (scale * v).to(weight.dtype.element_ty), mask=mask)
        tile += 1


@triton.jit(do_not_specialize=["filter_numel"])
def _backward_kernel(
    grad_direction, grad_log_scale, grad, direction, log_scale, filter_numel,
    COMPUTE_DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    scale = tl.exp(tl.load(log_scale + number).to(COMPUTE_DTYPE))
    VECTOR: tl.constexpr = 128 // direction.dtype.element_ty.primitive_bitwidth
    if filter_numel % VECTOR == 0:
        total = _backward(
            grad_direction, grad, direction, scale, number, filter_numel, TILE, VECTOR
        )
    else:
        total = _backward(grad_direction, grad, direction, scale, number, filter_numel, TILE, 1)
    dg = scale * total
    tl.store(grad_log_scale + number, dg.to(grad_log_scale.dtype.element_ty))


@triton.jit
def _backward(
    grad_direction, grad, direction, scale, number, filter_numel, TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Store dV, and return <dW, V>."""
    end = multiple(filter_numel, VECTOR)
    begin = number.to(tl.int64) * end
    total = tl.zeros([TILE], scale.dtype)
    tile = number * 0
    while tile * TILE < end:
        offsets = tile * TILE + tl.arange(0, TILE)
        mask = offsets < end
        v = read(direction + begin, offsets, mask, VECTOR).to(scale.dtype)
        dw = read(grad + begin, offsets, mask, VECTOR).to(scale.dtype)
        total = tl.fma(dw, v, total)
        dv = (scale * dw).to(grad_direction.dtype.element_ty)
        tl.store(grad_direction + begin + offsets, dv, mask=mask)
        tile += 1
    return tl.sum(total, axis=0)


def exp_scale(direction: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the operator of `czm_fused.ops.exp_scale`."""
    direction = to_contiguous_or_channels_last(direction)
    weight = torch.empty_like(direction)
    _launch(_forward_kernel, direction, weight, direction, log_scale.contiguous())
    return weight


def exp_scale_backward(grad: Tensor, direction: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient operator of `czm_fused.ops.exp_scale`."""
    direction, log_scale = to_contiguous_or_channels_last(direction), log_scale.contiguous()
    grad_direction, grad_log_scale = torch.empty_like(direction), torch.zeros_like(log_scale)
    _launch(
        _backward_kernel,
        direction,
        grad_direction,
        grad_log_scale,
        to_layout_of(grad, direction),
        direction,
        log_scale,
    )
    return grad_direction, grad_log_scale


def _launch(kernel: triton.JITFunction, direction: Tensor, *tensors: Tensor) -> None:
    if direction.numel() == 0:
        return
    filters = direction.shape[0]
    with current(direction.device):
        kernel[(filters,)](
            *tensors,
            direction.numel() // filters,
            COMPUTE_DTYPE=real_dtype(direction.dtype),
            TILE=_TILE,
            enable_fp_fusion=False,
        )
