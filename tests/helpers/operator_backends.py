"""Every way to run add_relu_noise and exp_scale, forward and backward."""

from __future__ import annotations

import functools
import importlib
import math
import os
import struct
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from czm_fused.ops import add_relu_noise, backends, exp_scale  # noqa: F401
from czm_fused.ops.layout import to_contiguous_or_channels_last, to_layout_of
from czm_fused.ops.step.spec import DTYPES, compute_dtype
from helpers import triton_interpreter

_FOLDERS = {
    "add_relu_noise": "add_relu_noise",
    "add_relu_noise_backward": "add_relu_noise",
    "exp_scale": "exp_scale",
    "exp_scale_backward": "exp_scale",
}


def _triton_launcher(name: str) -> str:
    return f"czm_fused.ops.{_FOLDERS[name]}.triton"


class OperatorBackend:
    """A backend of the package on a type of device.

    Attributes:
        name: in the names of tests.
        device: where the tensors are.
        is_simulated: True for those that stand in for a GPU.
        sums_in_float64: True where a sum over a filter has no rounding that matters.
    """

    is_simulated = False

    def __init__(self, backend: str, device: str, name: str = "") -> None:
        self.name = name or f"{backend}-on-{device}"
        self.backend, self.device = backend, device
        self.sums_in_float64 = backend == "cuda"

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU"
        return backends.problem(self.backend, self.device)

    def __call__(self, name: str, *arguments: Tensor | None) -> Any:
        """Run the operator of that name, without a gradient."""
        with mock.patch.dict(os.environ, {backends.ENVIRONMENT_VARIABLE: self.backend}):
            return getattr(torch.ops.czm_fused, name)(*arguments)

    def __repr__(self) -> str:
        return self.name


class SimulatedTriton(OperatorBackend):
    """The Triton kernels on the CPU, run by something that stands in for a GPU."""

    is_simulated = True

    def __init__(self, name: str) -> None:
        super().__init__("triton", "cpu", name)

    @functools.cached_property
    def obstacle(self) -> str | None:
        return triton_interpreter.obstacle()


class InterpretedOperators(SimulatedTriton):
    """The Triton kernels under Triton's interpreter, in another process."""

    def __call__(self, name: str, *arguments: Tensor | None) -> Any:
        return triton_interpreter.interpreter().call(f"{_triton_launcher(name)}:{name}", *arguments)


class TritonPtxOperators(SimulatedTriton):
    """The PTX of the Triton kernels, interpreted."""

    def __call__(self, name: str, *arguments: Tensor | None) -> Any:
        from ptx.recorder import Recorder
        from ptx.triton_driver import interpreted

        launcher = getattr(importlib.import_module(_triton_launcher(name)), name)
        with interpreted(Recorder(approx_error=1.0)):
            return launcher(*arguments)


class CudaOperators(OperatorBackend):
    """The CUDA kernels on the CPU, with the tensors that `csrc/cuda/*.cu` hands to them.

    Args:
        is_wide: take the division of tensors too large for a test.
    """

    is_simulated = True

    def __init__(self, name: str, is_wide: bool) -> None:
        super().__init__("cuda", "cpu", name + ("-wide" if is_wide else ""))
        self.is_wide = is_wide

    def __call__(self, name: str, *arguments: Tensor | None) -> Any:
        run: Callable[..., Any] = getattr(self, f"_{name}")
        return run(*arguments)

    def launch(self, name: str, dtype: torch.dtype, tensors: list[Any], sizes: Any) -> None:
        """Launch a kernel.

        Args:
            name: of the operator.
            dtype: of the stored tensors.
            tensors: those that it takes, results first; None for those that are not.
            sizes: `(filters, filter_numel)`, or `(numel, channels, area, channels_last)`.
        """
        raise NotImplementedError

    def _exp_scale(self, direction: Tensor, log_scale: Tensor) -> Tensor:
        v = to_contiguous_or_channels_last(direction)
        g = log_scale.to(compute_dtype(v.dtype)).contiguous()
        weight = torch.empty_like(v)
        if v.numel():
            sizes = v.shape[0], v[0].numel()
            self.launch("exp_scale", v.dtype, [weight, v, g], sizes)
        return weight

    def _exp_scale_backward(
        self, grad: Tensor, direction: Tensor, log_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        v = to_contiguous_or_channels_last(direction)
        dw = to_layout_of(grad, v)
        g = log_scale.to(compute_dtype(v.dtype)).contiguous()
        dv, dg = torch.empty_like(v), torch.empty_like(g)
        if len(v):
            sizes = v.shape[0], v[0].numel()
            self.launch("exp_scale_backward", v.dtype, [dv, dg, dw, v, g], sizes)
        return dv, dg.to(log_scale.dtype)

    def _add_relu_noise(self, x: Tensor, residual: Tensor | None, noise: Tensor | None) -> Tensor:
        x = to_contiguous_or_channels_last(x)
        residual = None if residual is None else to_layout_of(residual, x)
        output = torch.empty_like(x)
        self._over_activation("add_relu_noise", x, [output, x, residual, noise])
        return output

    def _add_relu_noise_backward(
        self, grad: Tensor, output: Tensor, noise: Tensor | None
    ) -> Tensor:
        output = to_contiguous_or_channels_last(output)
        grad_input = torch.empty_like(output)
        tensors = [grad_input, to_layout_of(grad, output), output, noise]
        self._over_activation("add_relu_noise_backward", output, tensors)
        return grad_input

    def _over_activation(self, name: str, x: Tensor, tensors: list[Tensor | None]) -> None:
        if x.numel():
            noise = tensors[-1]
            tensors[-1] = None if noise is None else noise.contiguous()
            area = math.prod(x.shape[2:])
            is_channels_last = area == 1 or not x.is_contiguous()
            sizes = x.numel(), x.shape[1], area, is_channels_last
            self.launch(name, x.dtype, tensors, sizes)


class HostOperators(CudaOperators):
    """The source of the CUDA kernels, compiled for the host."""

    def __init__(self, is_wide: bool = False) -> None:
        super().__init__("cuda-on-host-small", is_wide)

    @functools.cached_property
    def obstacle(self) -> str | None:
        from cuda_on_host import build

        return build.obstacle()

    def launch(self, name: str, dtype: torch.dtype, tensors: list[Any], sizes: Any) -> None:
        from cuda_on_host import build

        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        division = (self.is_wide,) if name.startswith("add_relu_noise") else ()
        getattr(build.kernels("small"), name)(DTYPES[dtype], *addresses, *sizes, *division)


class CudaPtxOperators(CudaOperators):
    """The PTX of the CUDA kernels, interpreted."""

    _MANGLED = {
        torch.float32: "f",
        torch.float64: "d",
        torch.bfloat16: "13__nv_bfloat16",
        torch.float16: "6__half",
    }

    def __init__(self, is_wide: bool = False) -> None:
        super().__init__("cuda-ptx", is_wide)

    @functools.cached_property
    def obstacle(self) -> str | None:
        from ptx import nvcc

        return nvcc.obstacle()

    def launch(self, name: str, dtype: torch.dtype, tensors: list[Any], sizes: Any) -> None:
        from ptx import nvcc
        from ptx.recorder import Recorder

        is_filter = name.startswith("exp_scale")
        stored = [each for each in tensors if each is not None and each.dtype == dtype]
        if not is_filter:
            stored = [each for each in tensors[:-1] if each is not None]
        elif len(tensors) == 5:
            stored = [tensors[0], *tensors[2:4]]
        else:
            stored = tensors[:2]
        widest = 16 // dtype.itemsize
        is_aligned = all(each.data_ptr() % 16 == 0 for each in stored)
        if is_filter:
            is_aligned = is_aligned and sizes[1] % widest == 0
        size = widest if is_aligned else 1
        division = "" if is_filter else "WideDivider" if self.is_wide else "Divider"
        mangled = f"NS_{len(division)}{division}E" if division else ""
        stem = f"{name}_kernel"
        entry = f"{len(stem)}{stem}ILi{size}E{self._MANGLED[dtype]}{mangled}E"
        kernel = nvcc.kernel(nvcc.compiled(nvcc.OPERATORS), entry)
        values: list[int | bytes] = [0 if each is None else each.data_ptr() for each in tensors]
        if is_filter:
            values.append(sizes[1])
            threads, grid = 128, sizes[0]
        else:
            count, channels, area, is_channels_last = sizes
            values[-1] = self._noise(values[-1], channels, area, is_channels_last)
            values.append(count)
            threads, grid = 256, -(-count // (256 * size))
        named = {f"argument {number}": tensor for number, tensor in enumerate(tensors)}
        Recorder(approx_error=1.0).launch(kernel, values, named, threads, grid)

    def _noise(self, address: int | bytes, channels: int, area: int, channels_last: bool) -> bytes:
        """Return the struct `Noise` of csrc/cuda/add_relu_noise_kernel.cuh."""
        head = struct.pack("<Q?7xq", address, channels_last, channels)
        divisors = (channels if channels_last else area, channels * area)
        raw = head + b"".join(map(self._divider, divisors))
        return raw + bytes(-len(raw) % 8)

    def _divider(self, divisor: int) -> bytes:
        if self.is_wide:
            return struct.pack("<q", divisor)
        shift = (divisor - 1).bit_length()
        inverse = ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1
        return struct.pack("<III", divisor, inverse % (1 << 32), shift)


NATIVE_OPERATORS = (
    OperatorBackend("reference", "cpu"),
    OperatorBackend("cpu", "cpu"),
    OperatorBackend("triton", "cuda"),
    OperatorBackend("cuda", "cuda"),
)
HOST_OPERATORS = HostOperators()
INTERPRETED_OPERATORS = InterpretedOperators("triton-interpreted")
CUDA_PTX_OPERATORS = CudaPtxOperators()
TRITON_PTX_OPERATORS = TritonPtxOperators("triton-ptx")
OPERATORS = (
    *NATIVE_OPERATORS,
    HOST_OPERATORS,
    INTERPRETED_OPERATORS,
    CUDA_PTX_OPERATORS,
    TRITON_PTX_OPERATORS,
)
WIDE_OPERATORS = (HostOperators(is_wide=True), CudaPtxOperators(is_wide=True))
