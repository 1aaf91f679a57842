"""The one list of a step's hyperparameters, of its state, and of what its kernels are told.

Columns, ranges, switches, checks, the operator's schema and the descriptors' layout are derived
from it; `csrc/descriptors.h` and `csrc/update_rule.h` are held against it by name and in order when
the native modules are loaded.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


class StepFlag(enum.IntFlag):
    """The parts of the method that act on one tensor."""

    MOMENTUM = 1
    EXP_SCALE = 2
    ZERO_MEAN = 4
    ANCHOR = 8
    DAMPENING = 16
    MASTER_WEIGHTS = 32
    GRAD_NORM = 64


# A tensor with one of these needs sums over its filters.
SUM_FLAGS = StepFlag.EXP_SCALE | StepFlag.ANCHOR | StepFlag.GRAD_NORM
# With one of these, it is stepped filter by filter.
FILTER_FLAGS = SUM_FLAGS | StepFlag.ZERO_MEAN


@dataclass(frozen=True)
class Hyperparameter:
    """A number of a parameter group.

    Attributes:
        name: key of the group.
        is_valid: returns True for the values that it may have.
        range: the same in words, for the error message.
        flag: the part of the method that it switches on where it is not 0, or None.
    """

    name: str
    is_valid: Callable[[float], bool]
    range: str
    flag: StepFlag | None = None


def _is_finite_and_not_negative(x: float) -> bool:
    return 0 <= x < math.inf


def _is_fraction(x: float) -> bool:
    return 0 <= x <= 1


_NOT_NEGATIVE = (_is_finite_and_not_negative, "a finite number >= 0")
_FRACTION = (_is_fraction, "in [0, 1]")
_SWITCH = (lambda x: True, "True or False")

HYPERPARAMETERS = (
    Hyperparameter("lr", *_NOT_NEGATIVE),
    Hyperparameter("momentum", *_NOT_NEGATIVE, StepFlag.MOMENTUM),
    Hyperparameter("dampening", *_FRACTION, StepFlag.DAMPENING),
    Hyperparameter("weight_decay", *_NOT_NEGATIVE),
    Hyperparameter("zmg", *_FRACTION, StepFlag.ZERO_MEAN),
    Hyperparameter("luma", *_NOT_NEGATIVE, StepFlag.ANCHOR),
    Hyperparameter("grad_norm", *_NOT_NEGATIVE, StepFlag.GRAD_NORM),
    Hyperparameter("nesterov", *_SWITCH),
    Hyperparameter("maximize", *_SWITCH),
)
HYPERPARAMETER_NAMES = tuple(hyperparameter.name for hyperparameter in HYPERPARAMETERS)

# The other options of a parameter group that decide what a step does to its tensors.
OPTIONS = ("exp_scale", "master_weights", "min_filter_dim", "max_filter_dim")


class Shape(enum.Enum):
    """The shape of a state tensor."""

    PARAM = enum.auto()  # the parameter's, with its strides
    FILTERS = enum.auto()  # (out_channels,)
    SCALAR = enum.auto()  # ()


@dataclass(frozen=True)
class State:
    """A tensor that the optimizer keeps for a parameter.

    Attributes:
        name: key of the parameter's state.
        flags: a parameter has this state if it has all of these.
        shape: its shape.
        dtype: its dtype; None for the parameter's; `COMPUTE` for that of the arithmetic.
    """

    name: str
    flags: StepFlag
    shape: Shape
    dtype: torch.dtype | str | None

    def belongs_to(self, flags: int) -> bool:
        """Return True if a parameter on which the parts `flags` act has this state."""
        return flags & self.flags == self.flags


COMPUTE = "compute"

STATES = (
    State("momentum_buffer", StepFlag.MOMENTUM, Shape.PARAM, None),
    State("log_scale", StepFlag.EXP_SCALE, Shape.FILTERS, COMPUTE),
    State(
        "log_scale_momentum_buffer",
        StepFlag.EXP_SCALE | StepFlag.MOMENTUM,
        Shape.FILTERS,
        COMPUTE,
    ),
    # The number of updates, kept only where dampening has to know the first.
    State("step", StepFlag.DAMPENING, Shape.SCALAR, torch.float32),
    # The float32 weight minus the parameter, in units of float32's last place.
    State("param_remainder", StepFlag.MASTER_WEIGHTS, Shape.PARAM, torch.int16),
)
STATE_NAMES = tuple(state.name for state in STATES)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# The fields of csrc/descriptors.h's TensorDescriptor: addresses first, then the layout.
ADDRESSES = ("param", *STATE_NAMES)
DESCRIPTOR_FIELDS = (
    *ADDRESSES,
    "numel",
    "filter_numel",
    "taps",
    "channels_last",
    "needs_sums",
    "dtype",
    "group",
    "first_filter",
    "first_work",
)
FIELD = {name: index for index, name in enumerate(DESCRIPTOR_FIELDS)}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on tensors of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_dtype(state: State, param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `state` has for a parameter of `param_dtype`."""
    if state.dtype == COMPUTE:
        return compute_dtype(param_dtype)
    return param_dtype if state.dtype is None else state.dtype  # type: ignore[return-value]
