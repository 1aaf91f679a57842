"""A step of one tensor: its memory, guarded, and what the step must make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from czm_fused.ops.step import reference
from czm_fused.ops.step.spec import StepFlag, compute_dtype
from helpers.cases import Case
from helpers.error_bounds import error_bounds


def strides(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Return the strides of a dense tensor of `shape` in `layout`."""
    order = list(range(len(shape)))
    if layout == "channels_last":
        order = [0, *order[2:], 1]
    elif layout == "transposed":
        order.reverse()
    result, expected = [0] * len(shape), 1
    for dim in reversed(order):
        result[dim] = expected
        expected *= max(shape[dim], 1)
    return tuple(result)


# Quiet NaNs that no arithmetic produces, so that even a NaN written over them shows.
_POISON = {
    torch.float32: (torch.int32, 0x7FD5AAAA),
    torch.float64: (torch.int64, 0x7FFD5555AAAA5555),
    torch.bfloat16: (torch.int16, 0x7FD5),
    torch.float16: (torch.int16, 0x7FD5),
    torch.int16: (torch.int16, 0x7FD5),
}
_GUARD = 64


class GuardedMemory:
    """A tensor inside a larger block of NaNs.

    Attributes:
        tensor: a copy of `values` in `layout`, `offset` elements off an aligned address.
        block: the whole memory, as integers.
    """

    def __init__(self, values: Tensor, layout: str, offset: int) -> None:
        bits, self._pattern = _POISON[values.dtype]
        self._begin = _GUARD + offset
        self._end = self._begin + values.numel()
        self.block = torch.full(
            (self._end + _GUARD,), self._pattern, dtype=bits, device=values.device
        )
        self.tensor = self.block.view(values.dtype).as_strided(
            values.shape, strides(values.shape, layout), self._begin
        )
        self.tensor.copy_(values)

    def is_intact(self) -> bool:
        """Whether the NaNs around the tensor are what they were, bit for bit."""
        guards = torch.cat([self.block[: self._begin], self.block[self._end :]])
        return bool((guards == self._pattern).all())


class Problem:
    """The tensors of a case, and what a step must make of them.

    Args:
        case: what to build.
        device: where.
        seed: of the random state.
    """

    OUTPUTS = ("param", "momentum_buffer", "log_scale", "log_scale_momentum_buffer")

    def __init__(self, case: Case, device: str = "cpu", seed: int = 0) -> None:
        self.case = case
        layouts = dict.fromkeys(("param", "momentum_buffer", "param_remainder"), case.layout)
        layouts["grad"] = case.grad_layout or case.layout
        self.memory = {
            name: GuardedMemory(values.to(device), layouts.get(name, "contiguous"), case.offset)
            for name, values in _random_state(case, seed).items()
        }
        self.remember()

    def remember(self) -> None:
        """Take the tensors as they are now for the inputs of the next step."""
        self.inputs = {name: memory.tensor.cpu().clone() for name, memory in self.memory.items()}

    def _exact_param(self, tensors: dict[str, Tensor]) -> Tensor:
        if self.case.master_weights:
            return reference.exact_param(tensors["param"], tensors["param_remainder"])
        return tensors["param"]

    def __getitem__(self, name: str) -> Tensor:
        return self.memory[name].tensor

    def outputs(self) -> dict[str, Tensor]:
        """Return the tensors that a step writes, as they are now, on the CPU."""
        return {
            name: self.memory[name].tensor.cpu().clone()
            for name in self.OUTPUTS
            if name in self.memory
        }

    def expected(self, grad_scale: float = 1.0) -> dict[str, Tensor]:
        """Return what the oracle, in float64, makes of the inputs."""
        values = {name: tensor.double() for name, tensor in self.inputs.items()}
        values["param"] = self._exact_param(self.inputs).double()
        options = self.case.options
        has_momentum = options.momentum != 0
        is_filter = len(self.case.shape) > 1
        reference.step_(
            values["param"],
            values["grad"] / grad_scale,
            values.get("momentum_buffer"),
            values.get("log_scale"),
            values.get("log_scale_momentum_buffer"),
            lr=options.lr,
            momentum=options.momentum,
            dampening=options.dampening if has_momentum and not self.case.first else 0.0,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
            maximize=options.maximize,
            zmg=options.zmg if is_filter else 0.0,
            luma=options.luma if is_filter else 0.0,
            grad_norm=options.grad_norm if is_filter else 0.0,
        )
        return {name: values[name] for name in self.OUTPUTS if name in values}

    def check(self, grad_scale: float = 1.0) -> None:
        """Assert that a step has been made, within its error bounds, and nothing else touched."""
        expected = self.expected(grad_scale)
        inputs = {**self.inputs, "param": self._exact_param(self.inputs)}
        bounds = error_bounds(self.case, inputs, expected, grad_scale)
        outputs = self.outputs()
        if self.case.master_weights:
            remainder = self["param_remainder"].cpu()
            exact = reference.exact_param(outputs["param"], remainder)
            # The parameter is nothing but the rounding, whatever the remainder says.
            assert torch.equal(exact.to(self.case.dtype), outputs["param"])
            outputs["param"] = exact
        for name, actual in outputs.items():
            error = (actual.double() - expected[name]).abs()
            wrong = ~(error <= bounds[name])
            assert not wrong.any(), (
                f"{self.case}: {int(wrong.sum())} of {wrong.numel()} of {name} are wrong, the "
                f"first at {wrong.nonzero()[0].tolist()}; the largest error is "
                f"{(error / bounds[name]).nan_to_num(nan=math.inf).max():.3g} bounds"
            )
        for name, memory in self.memory.items():
            assert memory.is_intact(), f"{self.case}: memory around {name} was written"
        self._check_grad(grad_scale)

    def _check_grad(self, grad_scale: float) -> None:
        """Assert that the gradient is as it was, divided by GradScaler's scale if there is one."""
        grad = self["grad"].cpu()
        if grad_scale != 1.0:
            unscaled = self.inputs["grad"].double() / grad_scale
            precision = torch.finfo(self.case.dtype)
            bound = 2 * precision.eps * unscaled.abs() + precision.smallest_normal * precision.eps
            assert ((grad.double() - unscaled).abs() <= bound).all()
            return
        assert torch.equal(grad, self.inputs["grad"])


def _random_state(case: Case, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape, flags = case.shape, case.flags
    filters = shape[0] if len(shape) > 1 else 1
    # Filters of norms near 1, off their anchors, and channels of means that CZMG has to see.
    unit = max(math.prod(shape) // max(filters, 1), 1) ** -0.5
    per_filter = (filters, *[1] * (len(shape) - 1)) if len(shape) > 1 else ()
    per_channel = (*shape[:2], *[1] * (len(shape) - 2))
    param = unit * randn(*shape) * (1 + 0.5 * torch.rand(per_filter, generator=generator))
    grad = unit * (0.5 * randn(*shape) + 0.3 * randn(*per_channel)) + 0.3 * param
    real = compute_dtype(case.dtype)
    state = {"param": param.to(case.dtype), "grad": grad.to(case.dtype)}
    if flags & StepFlag.MOMENTUM:
        state["momentum_buffer"] = (0.5 * unit * randn(*shape)).to(case.dtype)
    if flags & StepFlag.EXP_SCALE:
        norms = state["param"].double().flatten(1).norm(dim=1).clamp(min=1e-30)
        state["log_scale"] = (norms.log() + 0.3 * randn(filters)).to(real)
        if flags & StepFlag.MOMENTUM:
            state["log_scale_momentum_buffer"] = (0.3 * randn(filters)).to(real)
    if case.master_weights:
        state["param_remainder"] = torch.empty(shape, dtype=torch.int16)
        reference.set_param_(state["param"], param.float(), state["param_remainder"])
    if case.first:
        for name in ("momentum_buffer", "log_scale_momentum_buffer"):
            if name in state:
                state[name].zero_()
    return state


def step_arguments(
    problems: Sequence[Problem],
    backend: str,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[object, ...]:
    """Return the arguments of `czm_fused::step_` for one step of all problems, a group each."""
    all_flags = [problem.case.flags for problem in problems]

    def state(name: str) -> list[Tensor]:
        return [problem[name] for problem in problems if name in problem.memory]

    device = problems[0]["param"].device
    steps = [
        torch.tensor(0.0 if problem.case.first else 3.0, device=device)
        for problem, flags in zip(problems, all_flags, strict=True)
        if flags & StepFlag.DAMPENING
    ]
    rows = [problem.case.options.row() for problem in problems]
    return (
        state("param"),
        state("grad"),
        state("momentum_buffer"),
        state("log_scale"),
        state("log_scale_momentum_buffer"),
        steps,
        state("param_remainder"),
        all_flags,
        list(range(len(problems))),
        torch.tensor(rows, dtype=torch.float64),
        backend,
        grad_scale,
        found_inf,
    )
