"""Reads the live tensors of a step, and checks that they are what a plan was built for."""

# torch is typed in part.
# mypy: no-warn-return-any

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from czm_fused.ops import backends
from czm_fused.ops.step.descriptors import StepTensor
from czm_fused.ops.step.spec import (
    DESCRIPTOR_FIELDS,
    HYPERPARAMETER_NAMES,
    STATE_NAMES,
    STATES,
    Shape,
    State,
    state_dtype,
)

ParamState = Mapping[str, Any]

_grad_of = operator.attrgetter("grad")

_DLPACK_FLOAT, _DLPACK_BFLOAT, _DLPACK_INT = 2, 4, 0
_DLPACK_CODES = {
    torch.float32: _DLPACK_FLOAT,
    torch.float64: _DLPACK_FLOAT,
    torch.float16: _DLPACK_FLOAT,
    torch.bfloat16: _DLPACK_BFLOAT,
    torch.int16: _DLPACK_INT,
}


class StepInputs(NamedTuple):
    """The tensors of one step on one device.

    Attributes:
        params: the parameters.
        grads: their gradients, in the parameters' layout; None where a parameter has none.
        states: their states; None where a parameter has none.
        addresses: the descriptors with the addresses of all tensors, then those of the gradients;
            None for the reference backend.
        is_complete: True if no address of a gradient is 0, so that every parameter has one.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    states: Sequence[ParamState | None]
    addresses: bytes | None
    is_complete: bool

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the descriptors, `(tensors, fields)`, and the addresses of the gradients."""
        assert self.addresses is not None
        count = len(self.params)
        words = np.frombuffer(self.addresses, dtype=np.int64)
        return words[:-count].reshape(count, len(DESCRIPTOR_FIELDS)), words[-count:]


def find_tensors(
    params: list[Tensor], state: dict[Tensor, ParamState]
) -> tuple[list[Tensor | None], list[ParamState | None]]:
    """Return the gradients and the states of parameters, None for what there is not.

    Args:
        params: the parameters of an optimizer, in the order of its groups.
        state: the optimizer's state.
    """
    native = native_module()
    if native is None:
        return list(map(_grad_of, params)), list(map(state.get, params))
    return native.find_tensors(_torch_objects(), params, state)


class ListedStates(Sequence[ParamState]):
    """The states of parameters of which each has a gradient, kept as lists.

    Args:
        lists: for each of `STATES` the tensors of the parameters that have it, in their order.
        places: for each of `STATES` where in its list each parameter has its tensor, by number.
        count: the number of parameters.
    """

    def __init__(
        self,
        lists: tuple[list[Tensor], ...],
        places: Sequence[Mapping[int, int]],
        count: int,
    ) -> None:
        self.lists = lists
        self._places = places
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> ParamState:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return {
            name: tensors[places[index]]
            for name, tensors, places in zip(STATE_NAMES, self.lists, self._places, strict=True)
            if index in places
        }


class TensorReader:
    """Checks the tensors of each step against the layouts of a plan, and returns their addresses.

    Args:
        tensors: the parameters as planned; None for those that are not stepped.
        descriptors: as `build_descriptors` returns them.
        device: where all tensors must be.
    """

    def __init__(
        self, tensors: Sequence[StepTensor | None], descriptors: np.ndarray, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._descriptors = descriptors
        self._device = device
        # The last result: its addresses are compared with, and never followed.
        self._last: bytes | None = None
        self._native = native_module()
        if self._native is not None:
            self._descriptor_bytes = descriptors.tobytes()
            self._layout_bytes = _encode_layouts(tensors, device)

    def read(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: Sequence[ParamState | None],
    ) -> StepInputs | int:
        """Return the inputs of a step, or the index of a parameter that is not as planned."""
        if self._native is None:
            return self._read_in_python(params, grads, states)
        result: tuple[bytes, bool] | int = self._native.read_tensors(
            _torch_objects(),
            self._descriptor_bytes,
            self._layout_bytes,
            STATE_NAMES,
            params,
            grads,
            states.lists if isinstance(states, ListedStates) else states,
            self._last,
        )
        if isinstance(result, int):
            return result
        self._last = result[0]
        return StepInputs(params, grads, states, *result)

    def _read_in_python(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: Sequence[ParamState | None],
    ) -> StepInputs | int:
        descriptors = self._descriptors.copy()
        grad_addresses = np.zeros(len(params), dtype=np.int64)
        for index, (tensor, param, grad, state) in enumerate(
            zip(self._tensors, params, grads, states, strict=True)
        ):
            if grad is None:
                continue
            if tensor is None or problem_of_param(param, tensor, self._device) is not None:
                return index
            if problem_of_param(grad, tensor, self._device) is not None:
                return index
            descriptors[index, 0] = param.data_ptr()
            grad_addresses[index] = grad.data_ptr()
            for column, its_state in enumerate(STATES, start=1):
                if not its_state.belongs_to(tensor.flags):
                    continue
                value = None if state is None else state.get(its_state.name)
                if problem_of_state(value, its_state, tensor, self._device) is not None:
                    return index
                descriptors[index, column] = value.data_ptr()  # type: ignore[union-attr]
        addresses = descriptors.tobytes() + grad_addresses.tobytes()
        return StepInputs(params, grads, states, addresses, bool(grad_addresses.all()))


@functools.cache
def native_module() -> ModuleType | None:
    """Return the native module that reads tensors, or None where it cannot.

    Raises:
        ImportError: it was built from other sources than this package.
    """
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    if backends.problem("cpu", "cpu") is not None:
        return None
    from czm_fused import _C_cpu  # type: ignore[attr-defined]

    for what, ours, theirs in (
        ("descriptor", DESCRIPTOR_FIELDS, _C_cpu.descriptor_fields.split()),
        ("hyperparameter", HYPERPARAMETER_NAMES, _C_cpu.hyperparameters.split()),
    ):
        for name, native_name in zip(ours, theirs, strict=False):
            if name != native_name:
                raise ImportError(
                    f"the native cpu module has the {what} field {native_name!r} where this "
                    f"package has {name!r}: it was built from other sources; install again"
                )
        if len(ours) != len(theirs):
            raise ImportError(
                f"the native cpu module has {len(theirs)} {what} fields where this package has "
                f"{len(ours)}: it was built from other sources; install again"
            )
    return _C_cpu


@functools.cache
def _torch_objects() -> tuple[object, ...]:
    tensor = torch.empty(1, device="cpu")
    return (
        torch.Tensor.__dlpack_c_exchange_api__,
        torch.Tensor,
        torch.nn.Parameter,
        torch.Tensor.grad,
        tensor.is_neg,
        torch.Tensor.storage_offset,
        tensor,
        getattr(tensor.untyped_storage(), "_cdata", 0),
    )


def _encode_layouts(tensors: Sequence[StepTensor | None], device: torch.device) -> bytes:
    """Encode what the tensors must be, as csrc/read_tensors.cpp takes it."""
    words = list(torch.empty(0, device=device).__dlpack_device__())
    for tensor in tensors:
        layout = [0]
        if tensor is not None:
            layout = [1, *_encode_layout(tensor.dtype, tensor.shape, tensor.strides)]
            for state in STATES:
                if state.belongs_to(tensor.flags):
                    layout += [1, *_encode_layout(*layout_of_state(state, tensor))]
                else:
                    layout.append(0)
        words += [len(layout) + 1, *layout]
    return np.array(words, dtype=np.int64).tobytes()


def _encode_layout(
    dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> list[int]:
    any_stride = 0 in shape
    return [
        _DLPACK_CODES[dtype] << 8 | dtype.itemsize * 8,
        len(shape),
        *shape,
        *(-1 if any_stride or n == 1 else stride for n, stride in zip(shape, strides, strict=True)),
    ]


def layout_of_state(
    state: State, tensor: StepTensor
) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """Return the dtype, shape and strides of a parameter's state."""
    dtype = state_dtype(state, tensor.dtype)
    if state.shape is Shape.PARAM:
        return dtype, tensor.shape, tensor.strides
    if state.shape is Shape.FILTERS:
        return dtype, tensor.shape[:1], (1,)
    return dtype, (), ()


def matching_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Return True if strides `a` and `b` mean the same order of the elements of `shape`."""
    return 0 in shape or all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def is_readable(tensor: Tensor) -> bool:
    """Return True if the tensor's memory holds its values as they are."""
    if torch.compiler.is_compiling():
        return True
    return not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())


def has_memory(tensor: Tensor) -> bool:
    """Return True unless the tensor's storage is smaller than its elements need.

    Always true while torch.compile traces, where tensors have no storage of their own.
    """
    if torch.compiler.is_compiling() or tensor.numel() == 0 or tensor.device.type == "meta":
        return True
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed


def problem_of_param(
    tensor: Tensor, planned: StepTensor, device: torch.device, *, by_address: bool = True
) -> str | None:
    """Say how a parameter or gradient differs from what was planned, or return None.

    Args:
        tensor: the parameter or gradient.
        planned: the parameter as planned.
        device: where it must be.
        by_address: check what only kernels depend on, too: strides, and the negative bit.
    """
    layout = (planned.dtype, planned.shape, planned.strides)
    return _problem(tensor, *layout, device, by_address)


def problem_of_state(
    value: object,
    state: State,
    planned: StepTensor,
    device: torch.device,
    *,
    by_address: bool = True,
) -> str | None:
    """Say how a state differs from what a step of its parameter needs, or return None.

    See `problem_of_param` for the arguments.
    """
    return _problem(value, *layout_of_state(state, planned), device, by_address)


def _problem(
    tensor: object,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
    by_address: bool,
) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, but was {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"must be dense, but was {tensor.layout}"
    if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
        return (
            f"must be {dtype} of shape {shape} on {device}, but was {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    if by_address and not matching_strides(shape, tensor.stride(), strides):
        return f"must have strides {strides}, but has {tensor.stride()}"
    if not has_memory(tensor):
        return (
            f"must have {math.prod(shape)} elements in memory, but its storage was resized to "
            f"{tensor.untyped_storage().nbytes()} bytes"
        )
    if by_address and not is_readable(tensor):
        return "must hold its values as they are, but has a negative or zero bit"
    return None


def check_grads(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients in their parameters' layout, copied where they are not.

    Raises:
        RuntimeError: a gradient that is sparse, not floating-point, of another shape or device than
            its parameter, or without memory.
    """
    ordered: list[Tensor | None] = []
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            ordered.append(None)
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {number} is {grad.layout}, which FusedCZMSGD does not "
                "take; use a dense gradient (for nn.Embedding: sparse=False)"
            )
        is_of_dtype = grad.dtype == param.dtype or grad.is_floating_point()
        if not is_of_dtype or (grad.shape, grad.device) != (param.shape, param.device):
            raise RuntimeError(
                f"the gradient of parameter {number} is {grad.dtype} of shape {tuple(grad.shape)} "
                f"on {grad.device}, but the parameter is {param.dtype} of shape "
                f"{tuple(param.shape)} on {param.device}; they must agree"
            )
        if not has_memory(grad):
            raise RuntimeError(
                f"the gradient of parameter {number} has no memory: its storage was resized to "
                f"{grad.untyped_storage().nbytes()} bytes"
            )
        if (
            type(grad) in (Tensor, torch.nn.Parameter)
            and is_readable(grad)
            and matching_strides(param.shape, grad.stride(), param.stride())
        ):
            ordered.append(grad)
        else:
            like = torch.empty_like(param, dtype=grad.dtype, requires_grad=False)
            ordered.append(like.copy_(grad))
    return ordered
