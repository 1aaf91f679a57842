"""czm_fused::step_, the whole optimizer step as one operator, and the plan it runs by."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from czm_fused import reference
from czm_fused.ops import backends
from czm_fused.ops.library import lib
from czm_fused.ops.table import (
    DeviceScalar,
    HyperParameters,
    StepEntry,
    build_table,
    same_memory_order,
)

# What a tensor of a step is, as bits of one integer.
HAS_MOMENTUM = 1
IS_EXP_SCALED = 2
IS_ZERO_MEAN = 4
IS_ANCHORED = 8
IS_DAMPENED = 16

lib.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] log_scales, Tensor(d!)[] log_scale_momentum_buffers, Tensor(e!)[] steps, "
    "int[] kinds, int[] groups, Tensor hyper_parameters, str backend, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)
# Native code implements this one; the addresses in it keep it out of compiled graphs.
lib.define(
    "launch_step(Tensor table, Tensor grad_addresses, Tensor hyper_parameters, "
    "Tensor hyper_parameter_addresses, int work, Tensor? grad_scale, Tensor? found_inf) -> ()"
)


class CpuStep:
    """Runs the C++ kernel over a table of CPU tensors."""

    # Plain tensors are split so that threads share them.
    _PLAIN_BLOCK = 16384

    def __init__(self, entries: Sequence[StepEntry]) -> None:
        self._table, _, self._work = build_table(entries, self._PLAIN_BLOCK)
        self._grad_addresses = torch.zeros(len(entries), dtype=torch.int64)
        self._grad_addresses_view = self._grad_addresses.numpy()

    def __call__(
        self,
        grads: Sequence[Tensor],
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        self._grad_addresses_view[:] = list(map(Tensor.data_ptr, grads))
        torch.ops.czm_fused.launch_step.default(
            self._table,
            self._grad_addresses,
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
                grad = grad / grad_scale.to(grad.device)
            has_momentum = entry.momentum_buffer is not None
            # Without momentum torch.optim.SGD ignores dampening, and so it does at the first step.
            first = entry.step is not None and entry.step.item() == 0
            reference.step_(
                entry.param,
                grad,
                entry.momentum_buffer,
                entry.log_scale,
                entry.log_scale_momentum_buffer,
                lr=group["lr"],
                momentum=group["momentum"] if has_momentum else 0.0,
                dampening=group["dampening"] if has_momentum and not first else 0.0,
                weight_decay=group["weight_decay"],
                nesterov=bool(group["nesterov"]),
                maximize=bool(group["maximize"]),
                zmg=group["zmg"] if entry.zero_mean else 0.0,
                luma=group["luma"] if entry.anchored else 0.0,
            )


def _runner(backend: str, entries: Sequence[StepEntry]) -> CpuStep | ReferenceStep:
    return {"cpu": CpuStep, "reference": ReferenceStep}[backend](entries)


class StepPlan:
    """The step of a fixed list of tensors on one device, ready to run again and again.

    Args:
        entries: the tensors and their state.
        backend: one of `backends.BACKENDS`.

    Raises:
        ValueError: a tensor whose memory the backend cannot walk.
    """

    def __init__(self, entries: Sequence[StepEntry], backend: str) -> None:
        self.backend = backend
        self.params = [entry.param for entry in entries]
        self.steps = [entry.step for entry in entries if entry.step is not None]
        # Detached aliases keep the memory from being reused: an equal address is the same memory.
        self._memory = [param.detach() for param in self.params]
        self._addresses = list(map(Tensor.data_ptr, self.params))
        self._strides = list(map(Tensor.stride, self.params))
        self._dtypes = [param.dtype for param in self.params]
        self._device = self.params[0].device
        self._devices = [self._device] * len(self.params)
        self._run = _runner(backend, entries)

    def still_describes(self, params: list[Tensor]) -> bool:
        """Whether `params` are the plan's, in its order and where they were."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and list(map(Tensor.data_ptr, params)) == self._addresses
        )

    def run(
        self,
        grads: list[Tensor],
        hyper_parameters: HyperParameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update every tensor of the plan in place.

        Args:
            grads: a gradient for each parameter, of its shape, dtype and device.
            hyper_parameters: of the groups that the entries name.
            grad_scale: what the gradients are divided by, or None for 1.
            found_inf: nothing is updated where this is not 0.

        Raises:
            RuntimeError: a gradient that is sparse, or of another dtype or device than its
                parameter; nothing is updated then.
        """
        self._run(self._checked(grads), hyper_parameters, grad_scale, found_inf)
        if self.steps:
            updated = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
            torch._foreach_add_(self.steps, updated)

    def _checked(self, grads: list[Tensor]) -> list[Tensor]:
        """Return the gradients in their parameters' memory order."""
        if [grad.dtype for grad in grads] != self._dtypes or [
            grad.device for grad in grads
        ] != self._devices:
            _refuse_grads(self.params, grads)
        try:
            strides = list(map(Tensor.stride, grads))
        except RuntimeError:
            _refuse_grads(self.params, grads)
            raise
        if strides == self._strides:
            return grads
        return [
            grad if same_memory_order(param, grad) else torch.empty_like(param).copy_(grad)
            for param, grad in zip(self.params, grads, strict=True)
        ]


def _refuse_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for number, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {number} is {grad.layout}, which FusedCZMSGD does not "
                "take; use a dense gradient (for nn.Embedding: sparse=False)"
            )
        if grad.dtype != param.dtype or grad.device != param.device:
            raise RuntimeError(
                f"the gradient of parameter {number} is {grad.dtype} on {grad.device}, but the "
                f"parameter is {param.dtype} on {param.device}; they must agree"
            )


def entries_from_lists(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    log_scale_momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    kinds: Sequence[int],
    groups: Sequence[int],
) -> list[StepEntry]:
    """Deal the lists of `czm_fused::step_` out to their parameters, as `kinds` says."""
    momentum = iter(momentum_buffers)
    log_scale = iter(log_scales)
    log_scale_momentum = iter(log_scale_momentum_buffers)
    step = iter(steps)
    return [
        StepEntry(
            param=param,
            momentum_buffer=next(momentum) if kind & HAS_MOMENTUM else None,
            log_scale=next(log_scale) if kind & IS_EXP_SCALED else None,
            log_scale_momentum_buffer=(
                next(log_scale_momentum)
                if kind & IS_EXP_SCALED and kind & HAS_MOMENTUM
                else None
            ),
            step=next(step) if kind & IS_DAMPENED else None,
            group=group,
            zero_mean=bool(kind & IS_ZERO_MEAN),
            anchored=bool(kind & IS_ANCHORED),
        )
        for param, kind, group in zip(params, kinds, groups, strict=True)
    ]


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    log_scales: list[Tensor],
    log_scale_momentum_buffers: list[Tensor],
    steps: list[Tensor],
    kinds: list[int],
    groups: list[int],
    hyper_parameters: Tensor,
    backend: str,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if not params:
        return
    entries = entries_from_lists(
        params, momentum_buffers, log_scales, log_scale_momentum_buffers, steps, kinds, groups
    )
    plan = StepPlan(entries, backends.choose(params[0].device, backend))
    plan.run(grads, _hyper_parameters(hyper_parameters), grad_scale, found_inf)


def _hyper_parameters(tensor: Tensor) -> HyperParameters:
    if tensor.device.type == "cpu":
        return HyperParameters([tuple(row) for row in tensor.tolist()])
    rows = tensor.to(torch.float32).unbind()
    return HyperParameters([tuple(DeviceScalar(x.data_ptr(), x) for x in row) for row in rows])


lib.impl("step_", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("czm_fused::step_", lib=lib)
def _step_fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.register_fake("czm_fused::launch_step", lib=lib)
def _launch_step_fake(*args: object, **kwargs: object) -> None:
    return None
