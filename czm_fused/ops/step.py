"""czm_fused::step_, the whole optimizer step as one operator, and the plan it runs by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from czm_fused import reference
from czm_fused.ops import backends
from czm_fused.ops.registry import lib
from czm_fused.ops.table import (
    DTYPES,
    GROUP_COLUMNS,
    DeviceScalar,
    HyperParameters,
    StepEntry,
    build_table,
    check_entry,
    same_memory_order,
)

# What a tensor of a step is, as bits of one integer.
HAS_MOMENTUM = 1
IS_EXP_SCALED = 2
IS_ZERO_MEAN = 4
IS_ANCHORED = 8
IS_DAMPENED = 16
HAS_REMAINDER = 32

# The state that such a tensor has, in the order of the operator's lists: the bits that ask for it.
STATE_BITS = {
    "momentum_buffer": HAS_MOMENTUM,
    "log_scale": IS_EXP_SCALED,
    "log_scale_momentum_buffer": IS_EXP_SCALED | HAS_MOMENTUM,
    "step": IS_DAMPENED,
    "param_remainder": HAS_REMAINDER,
}

lib.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] log_scales, Tensor(d!)[] log_scale_momentum_buffers, Tensor(e!)[] steps, "
    "Tensor(f!)[] param_remainders, int[] kinds, int[] groups, Tensor hyper_parameters, "
    "str backend, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)
# Native code implements this one; the addresses in it keep it out of compiled graphs.
lib.define(
    "launch_step(Tensor table, Tensor grad_addresses, Tensor hyper_parameters, "
    "Tensor hyper_parameter_addresses, int work, Tensor? grad_scale, Tensor? found_inf) -> ()"
)
# Whether `grads` lie as `layouts` says, and if so their addresses; see `_layouts`.
lib.define("read_gradients(Tensor layouts, Tensor[] grads, Tensor(a!) addresses) -> bool")


class CpuStep:
    """Runs the C++ kernel over a table of CPU tensors."""

    # Plain tensors are split so that threads share them.
    _PLAIN_BLOCK = 16384

    def __init__(self, entries: Sequence[StepEntry]) -> None:
        self._table, _, self._work = build_table(entries, self._PLAIN_BLOCK)

    def __call__(
        self,
        grads: Sequence[Tensor],
        grad_addresses: Tensor,
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        torch.ops.czm_fused.launch_step.default(
            self._table,
            grad_addresses,
            hyper_parameters.values,
            hyper_parameters.addresses,
            self._work,
            grad_scale,
            found_inf,
        )


class ReferenceStep:
    """Runs the paper's equations in plain torch, tensor by tensor, on any device."""

    def __init__(self, entries: Sequence[StepEntry]) -> None:
        self._entries = entries

    def __call__(
        self,
        grads: Sequence[Tensor],
        grad_addresses: Tensor,
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if found_inf is not None and found_inf.item() != 0:
            return
        groups = [hyper_parameters.group(n) for n in range(len(hyper_parameters.rows))]
        for entry, grad in zip(self._entries, grads, strict=True):
            group = groups[entry.group]
            if grad_scale is not None:
                # In the arithmetic's dtype: a half gradient would be rounded, or vanish.
                grad = grad.to(reference.compute_dtype(grad.dtype)) / grad_scale
            has_momentum = entry.momentum_buffer is not None
            # Without momentum torch.optim.SGD ignores dampening, and so it does at the first step.
            first = entry.step is not None and entry.step.item() == 0
            reference.step_(
                entry.param,
                grad,
                entry.momentum_buffer,
                entry.log_scale,
                entry.log_scale_momentum_buffer,
                entry.param_remainder,
                lr=group["lr"],
                momentum=group["momentum"] if has_momentum else 0.0,
                dampening=group["dampening"] if has_momentum and not first else 0.0,
                weight_decay=group["weight_decay"],
                nesterov=bool(group["nesterov"]),
                maximize=bool(group["maximize"]),
                zmg=group["zmg"] if entry.zero_mean else 0.0,
                luma=group["luma"] if entry.anchored else 0.0,
            )


class _Runner(Protocol):
    def __call__(
        self,
        grads: Sequence[Tensor],
        grad_addresses: Tensor,
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...


def _runner(backend: str, entries: Sequence[StepEntry]) -> _Runner:
    if backend == "cuda":
        from czm_fused.ops.cuda import CudaStep

        return CudaStep(entries)
    if backend == "triton":
        from czm_fused.ops.triton.step import TritonStep

        return TritonStep(entries)
    return CpuStep(entries) if backend == "cpu" else ReferenceStep(entries)


class StepPlan:
    """The step of a fixed list of tensors on one device, ready to run again and again.

    Args:
        entries: the tensors and their state.
        backend: one of `backends.BACKENDS`.

    Raises:
        ValueError: a tensor whose memory the backend cannot walk, or state that does not fit its
            parameter.
    """

    def __init__(self, entries: Sequence[StepEntry], backend: str) -> None:
        self.params = [entry.param for entry in entries]
        self.steps = [entry.step for entry in entries if entry.step is not None]
        # Detached aliases keep the memory from being reused: an equal address is the same memory.
        self._memory = [param.detach() for param in self.params]
        self._addresses = list(map(Tensor.data_ptr, self._memory))
        # Who moves the state moves all of it: the ends stand for the rest.
        state = [
            tensor
            for entry in entries
            for tensor in (getattr(entry, name) for name in STATE_BITS)
            if tensor is not None
        ]
        self._state_memory = [tensor.detach() for tensor in state]
        self._state_ends = state[:1] + state[-1:]
        self._state_end_addresses = list(map(Tensor.data_ptr, self._state_ends))
        self._layouts = [(param.shape, param.stride()) for param in self.params]
        self._device = self.params[0].device
        self._grad_layouts = _layouts(self.params)
        self._grad_addresses = torch.zeros(len(entries), dtype=torch.int64)
        self._read_gradients = _gradients_reader(backend)
        self._in_order = False
        for number, entry in enumerate(entries):
            check_entry(number, entry, self._device)
        self._run = _runner(backend, entries)

    def still_describes(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Whether `params` lie where the plan's do, as they did, and its state where it did."""
        if (
            list(map(Tensor.data_ptr, params)) != self._addresses
            or list(map(Tensor.data_ptr, self._state_ends)) != self._state_end_addresses
        ):
            return False
        # Torch holds a gradient to its parameter's shape, and autograd to its strides: gradients in
        # order tell that no parameter was reshaped where it lies. One that was transposed there,
        # and given a gradient by hand that is not, goes unnoticed.
        self._in_order = self._read_gradients(self._grad_layouts, grads, self._grad_addresses)
        return self._in_order or [(p.shape, p.stride()) for p in params] == self._layouts

    def run(
        self,
        grads: list[Tensor],
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update every tensor of the plan in place.

        Args:
            grads: the gradients, as `in_memory_order` returns them.
            hyper_parameters: of the groups that the entries name.
            grad_scale: what the gradients are divided by, or None for 1.
            found_inf: nothing is updated where this is not 0.
        """
        if grad_scale is not None:
            grad_scale = grad_scale.to(self._device, torch.float32)
        if found_inf is not None:
            found_inf = found_inf.to(self._device, torch.float32)
        self._run(grads, self._grad_addresses, hyper_parameters, grad_scale, found_inf)
        if self.steps:
            updated = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
            torch._foreach_add_(self.steps, updated)

    def in_memory_order(self, grads: list[Tensor]) -> list[Tensor]:
        """Return the gradients in their parameters' memory order, copied where they are not.

        Raises:
            RuntimeError: a gradient that is sparse, or of another shape, dtype or device than its
                parameter.
        """
        if self._in_order:
            return grads
        _check_grads(self.params, grads)
        ordered = [
            grad if same_memory_order(param, grad) else torch.empty_like(param).copy_(grad)
            for param, grad in zip(self.params, grads, strict=True)
        ]
        self._grad_addresses.copy_(torch.tensor(list(map(Tensor.data_ptr, ordered))))
        return ordered


def _layouts(tensors: Sequence[Tensor]) -> Tensor:
    """Return what gradients like `tensors` lie like, as `read_gradients` takes it: for each of them
    dtype, dim, sizes and strides; 0 where the size is 1 and no stride matters.
    """
    layouts: list[int] = []
    for tensor in tensors:
        strides = (
            0 if size == 1 else stride
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        layouts += (DTYPES.get(tensor.dtype, -1), tensor.dim(), *tensor.shape, *strides)
    return torch.tensor(layouts, dtype=torch.int64)


def _gradients_reader(backend: str) -> Callable[[Tensor, list[Tensor], Tensor], bool]:
    if backend in ("cpu", "cuda") and backends.problem("cpu", "cpu") is None:
        return torch.ops.czm_fused.read_gradients.default
    return _read_gradients


def _read_gradients(layouts: Tensor, grads: list[Tensor], addresses: Tensor) -> bool:
    """Do what the native `read_gradients` does, where there is none."""
    if any(grad.layout != torch.strided for grad in grads):
        return False
    if not torch.equal(_layouts(grads), layouts):
        return False
    addresses.copy_(torch.tensor(list(map(Tensor.data_ptr, grads))))
    return True


def _check_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {number} is {grad.layout}, which FusedCZMSGD does not "
                "take; use a dense gradient (for nn.Embedding: sparse=False)"
            )
        if (grad.shape, grad.dtype, grad.device) != (param.shape, param.dtype, param.device):
            raise RuntimeError(
                f"the gradient of parameter {number} is {grad.dtype} of shape {tuple(grad.shape)} "
                f"on {grad.device}, but the parameter is {param.dtype} of shape "
                f"{tuple(param.shape)} on {param.device}; they must agree"
            )


def entries_from_lists(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    log_scale_momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    param_remainders: Sequence[Tensor],
    kinds: Sequence[int],
    groups: Sequence[int],
) -> list[StepEntry]:
    """Deal the lists of `czm_fused::step_` out to their parameters, as `kinds` says.

    Raises:
        ValueError: a list of another length than the parameters or `kinds` ask for.
    """
    for name, values in (("kinds", kinds), ("groups", groups)):
        _check_length(name, values, len(params))
    lists = (momentum_buffers, log_scales, log_scale_momentum_buffers, steps, param_remainders)
    for (name, bits), tensors in zip(STATE_BITS.items(), lists, strict=True):
        _check_length(f"{name}s", tensors, sum(kind & bits == bits for kind in kinds))
    state = {name: iter(tensors) for name, tensors in zip(STATE_BITS, lists, strict=True)}
    return [
        StepEntry(
            param=param,
            **{
                name: next(state[name]) if kind & bits == bits else None
                for name, bits in STATE_BITS.items()
            },
            group=group,
            zero_mean=bool(kind & IS_ZERO_MEAN),
            anchored=bool(kind & IS_ANCHORED),
        )
        for param, kind, group in zip(params, kinds, groups, strict=True)
    ]


def _check_length(name: str, values: Sequence[object], length: int) -> None:
    if len(values) != length:
        raise ValueError(f"{name} must have {length} elements, but has {len(values)}")


@torch.no_grad()
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    log_scales: list[Tensor],
    log_scale_momentum_buffers: list[Tensor],
    steps: list[Tensor],
    param_remainders: list[Tensor],
    kinds: list[int],
    groups: list[int],
    hyper_parameters: Tensor,
    backend: str,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if not params:
        return
    state = (momentum_buffers, log_scales, log_scale_momentum_buffers, steps, param_remainders)
    entries = entries_from_lists(params, *state, kinds, groups)
    _check_length("grads", grads, len(params))
    rows = _hyper_parameters(hyper_parameters)
    for group in groups:
        if not 0 <= group < len(rows.rows):
            raise ValueError(f"group {group} is not one of the {len(rows.rows)} hyper_parameters")
    plan = StepPlan(entries, backends.choose(params[0].device, backend))
    plan.run(plan.in_memory_order(grads), rows, grad_scale, found_inf)
    torch.autograd.graph.increment_version([*params, *itertools.chain(*state)])


def _hyper_parameters(tensor: Tensor) -> HyperParameters:
    if tensor.dim() != 2 or tensor.shape[1] != len(GROUP_COLUMNS):
        raise ValueError(
            f"hyper_parameters must have shape (groups, {len(GROUP_COLUMNS)}), but has "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device.type == "cpu":
        return HyperParameters([tuple(row) for row in tensor.tolist()])
    rows = tensor.to(torch.float32).unbind()
    return HyperParameters([tuple(DeviceScalar(x.data_ptr(), x) for x in row) for row in rows])


lib.impl("step_", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("czm_fused::step_", lib=lib)
def _step_fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.register_fake("czm_fused::read_gradients", lib=lib)
def _read_gradients_fake(layouts: Tensor, grads: list[Tensor], addresses: Tensor) -> bool:
    return True


@torch.library.register_fake("czm_fused::launch_step", lib=lib)
def _launch_step_fake(*args: object, **kwargs: object) -> None:
    return None
