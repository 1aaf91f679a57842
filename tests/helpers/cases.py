"""What the fused step is tested on: tensors in guarded memory, options, and how exact it must be.

Shared by every test that runs the step, whatever runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from helpers.error_bounds import error_bounds
from torch import Tensor

from czm_fused.ops import backends
from czm_fused.ops.step import reference
from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES, StepFlag, compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Kernels by their number of taps, and numbers of channels around every vector's width.
KERNELS = {1: (1, 1), 3: (3,), 5: (5,), 7: (7,), 9: (3, 3), 25: (5, 5), 27: (3, 3, 3), 49: (7, 7)}
CHANNELS = (1, 3, 15, 16, 17, 33, 64)


def unavailable(backend: str, device: str) -> str | None:
    """Say why `backend` cannot be tested on `device` here, or None if it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    return backends.problem(backend, device)


# Every way to run the step, and those that can run here.
BACKENDS = (
    ("reference", "cpu"),
    ("cpu", "cpu"),
    ("triton", "cpu"),
    ("triton", "cuda"),
    ("cuda", "cuda"),
)
AVAILABLE = [pair for pair in BACKENDS if unavailable(*pair) is None]


@dataclass(frozen=True)
class Options:
    """The hyper-parameters of a group; every one of the method's parts is on by default."""

    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    zmg: float = 0.85
    luma: float = 5e-4
    exp_scale: bool = True

    def row(self) -> list[float]:
        """Return the group's row of the operator's `hyperparameters`."""
        return [float(getattr(self, name)) for name in HYPERPARAMETER_NAMES]


PLAIN = Options(zmg=0.0, luma=0.0, exp_scale=False)


@dataclass(frozen=True)
class Case:
    """One tensor in the middle of its training.

    Attributes:
        shape: of the parameter.
        dtype: of parameter, gradient and momentum.
        layout: `contiguous`, `channels_last` (of any dimension) or `transposed` (2-d).
        grad_layout: of the gradient; None for the parameter's.
        options: the hyper-parameters.
        offset: how many elements every tensor is away from an aligned address.
        first: whether momentum has not begun yet, where dampening waits for it.
        master_weights: whether the parameter is the rounding of float32 weights.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad_layout: str | None = None
    options: Options = Options()
    offset: int = 0
    first: bool = False
    master_weights: bool = False

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)) or "scalar", str(self.dtype).removeprefix("torch.")]
        parts.append(self.layout + (f"/{self.grad_layout}" if self.grad_layout else ""))
        parts += [
            f"{name}={value}"
            for name, value in vars(self.options).items()
            if value != getattr(Options(), name)
        ]
        parts += [f"{name}={getattr(self, name)}" for name in
                  ("offset", "first", "master_weights") if getattr(self, name)]
        return "-".join(parts)

    @property
    def flags(self) -> int:
        """The operator's bits for this tensor: the filter options act from two dimensions on."""
        options, is_filter = self.options, len(self.shape) > 1
        return (
            StepFlag.MOMENTUM * (options.momentum != 0)
            | StepFlag.EXP_SCALE * (is_filter and options.exp_scale)
            | StepFlag.ZERO_MEAN * (is_filter and options.zmg != 0)
            | StepFlag.ANCHOR * (is_filter and options.luma != 0)
            | StepFlag.DAMPENING * (options.momentum != 0 and options.dampening != 0)
            | StepFlag.MASTER_WEIGHTS * self.master_weights
        )


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
        assert torch.equal(self.inputs["grad"], self["grad"].cpu())


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


def run(
    problems: Sequence[Problem],
    backend: str,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Make one step of all problems in one call of `czm_fused::step_`."""
    torch.ops.czm_fused.step_(*step_arguments(problems, backend, grad_scale, found_inf))


LAYOUTS = (("contiguous", None), ("channels_last", None), ("contiguous", "channels_last"))

# Everything; the spatial mean alone; the anchor alone.
FILTER_OPTIONS = {
    "czm": Options(),
    "mean": Options(zmg=1.0, luma=0.0, exp_scale=False, nesterov=True, weight_decay=0.1),
    "anchor": Options(momentum=0.0, zmg=0.0, luma=10.0, maximize=True),
}

SHAPE_CASES = [
    Case((2, channels, *kernel), dtype, layout, grad_layout, FILTER_OPTIONS[name])
    for kernel in KERNELS.values()
    for channels in CHANNELS
    for dtype in DTYPES
    for layout, grad_layout in LAYOUTS
    for name in ("czm", "mean")
    if name == "czm" or grad_layout is None
]

_SGD_OPTIONS = (
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
)
OPTION_CASES = [
    Case(
        (2, 17, 3, 3),
        options=Options(
            **sgd,
            weight_decay=weight_decay,
            maximize=maximize,
            zmg=zmg,
            luma=luma,
            exp_scale=exp_scale,
        ),
    )
    for sgd in _SGD_OPTIONS
    for weight_decay in (0.0, 0.1)
    for maximize in (False, True)
    for zmg in (0.0, 0.85, 1.0)
    for luma in (0.0, 5e-4, 10.0)
    for exp_scale in (False, True)
]

OTHER_CASES = [
    # One filter, and depthwise ones.
    Case((1, 5, 3, 3)),
    Case((1, 1, 3)),
    Case((64, 1, 3, 3)),
    Case((33, 1, 7, 7), layout="channels_last"),
    # Filters longer than any block that a kernel keeps at hand.
    *(
        Case((1, 40_000, 5, 5), dtype, layout)
        for dtype in (torch.float32, torch.bfloat16)
        for layout in ("contiguous", "channels_last")
    ),
    Case((2, 1_000, 200), options=FILTER_OPTIONS["anchor"]),
    Case((1, 1, 1_000_000)),
    Case((1, 1_000_000, 1)),
    Case((3, 455, 3, 3), torch.float64),
    # Rows of a matrix, anchored and scaled, and not.
    *(
        Case((5, width), dtype, options=options)
        for width in (1, 17, 300)
        for dtype in DTYPES
        for options in (Options(), PLAIN, replace(PLAIN, luma=0.1))
    ),
    Case((7, 5), layout="transposed", grad_layout="contiguous", options=PLAIN),
    Case((2, 3, 4, 5), layout="channels_last", options=PLAIN),
    # Plain tensors, around the blocks that threads share.
    *(
        Case(shape, dtype, options=replace(PLAIN, weight_decay=0.1))
        for shape in ((), (1,), (5,), (17,), (16_383,), (16_384,), (16_385,), (40_000,))
        for dtype in DTYPES
    ),
    # Nothing to do.
    *(Case(shape) for shape in ((0,), (0, 5), (0, 3, 3, 3))),
    *(Case(shape, options=PLAIN) for shape in ((0,), (0, 5), (0, 3, 3, 3), (3, 0), (4, 0, 3, 3))),
    # A tensor's first step, which is not dampened.
    *(
        Case((2, 5, 3, 3), options=replace(Options(dampening=0.3), exp_scale=exp_scale), first=True)
        for exp_scale in (False, True)
    ),
    # Float32 weights behind parameters of half the bytes.
    *(
        Case((2, channels, *kernel), dtype, layout, offset=offset, master_weights=True)
        for kernel, channels, offset in (
            ((1, 1), 33, 0), ((3,), 64, 0), ((3, 3), 17, 0), ((3, 3), 64, 0), ((3, 3), 17, 1),
            ((5, 5), 3, 0),
        )
        for dtype in (torch.bfloat16, torch.float16)
        for layout in ("contiguous", "channels_last")
    ),
    *(
        Case(shape, dtype, options=options, master_weights=True)
        for shape, options in (
            ((2, 17, 3, 3), Options(momentum=0.0, weight_decay=0.1)),
            ((5, 300), FILTER_OPTIONS["anchor"]),
            ((40_000,), PLAIN),
            ((1, 40_000, 5, 5), Options()),
            ((0, 5), Options()),
        )
        for dtype in (torch.bfloat16, torch.float16)
    ),
    # Misaligned memory.
    *(
        Case((3, 17, *kernel), dtype, layout, options=options, offset=offset)
        for kernel in ((3,), (3, 3), (5, 5))
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
        for options in (Options(), PLAIN)
        for offset in (1, 3)
    ),
]
