"""The cases of the fused step: tensors, options, and the lists that tests draw from.

Shared by every test that runs the step, whatever runs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES, StepFlag

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Kernels by their number of taps, and numbers of channels around every vector's width.
KERNELS = {1: (1, 1), 3: (3,), 5: (5,), 7: (7,), 9: (3, 3), 25: (5, 5), 27: (3, 3, 3), 49: (7, 7)}
CHANNELS = (1, 3, 15, 16, 17, 33, 64)


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
    grad_norm: float = 0.0
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
        parts += [
            f"{name}={getattr(self, name)}"
            for name in ("offset", "first", "master_weights")
            if getattr(self, name)
        ]
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
            | StepFlag.GRAD_NORM * (is_filter and options.grad_norm != 0)
            | StepFlag.DAMPENING * (options.momentum != 0 and options.dampening != 0)
            | StepFlag.MASTER_WEIGHTS * self.master_weights
        )


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
] + [
    Case(
        (2, 17, 3, 3),
        options=Options(
            **sgd,
            weight_decay=0.1,
            maximize=maximize,
            zmg=zmg,
            luma=luma,
            grad_norm=0.1,
            exp_scale=exp_scale,
        ),
    )
    for sgd in _SGD_OPTIONS
    for maximize in (False, True)
    for zmg, luma in ((0.0, 0.0), (0.85, 5e-4))
    for exp_scale in (False, True)
]

NORM = Options(grad_norm=0.1)
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
            ((1, 1), 33, 0),
            ((3,), 64, 0),
            ((3, 3), 17, 0),
            ((3, 3), 64, 0),
            ((3, 3), 17, 1),
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
    # Gradients of a given norm: of filters with and without a vector's remainder, of rows, and of
    # what is no filter.
    *(
        Case((3, channels, *kernel), dtype, layout, options=NORM, offset=offset)
        for channels, kernel, offset in ((1, (3, 3), 0), (17, (3, 3), 1), (64, (1, 1), 0))
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
    ),
    *(
        Case((3, 17, 3, 3), dtype, options=NORM, master_weights=True)
        for dtype in (torch.bfloat16, torch.float16)
    ),
    Case((5, 300), options=replace(PLAIN, grad_norm=2.0)),
    *(Case((40,), options=replace(PLAIN, grad_norm=2.0), offset=offset) for offset in (0, 1)),
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

# What groups of 32 to 256 threads hold in registers, at and around it, in whole and broken packs,
# in tiles, and channel by channel.
GROUP_CASES = [
    Case((filters, channels, taps), dtype, layout)
    for filters, sizes in (
        (3, (
            (71, 9), (72, 9), (142, 9), (143, 9), (192, 9), (284, 9), (285, 9), (568, 9), (569, 9),
            (570, 9), (427, 3), (1300, 2), (50, 49), (8, 640), (3, 1280), (2, 1281), (2, 1536),
            (1, 2000), (2, 2560), (2, 2561), (1, 5120), (1, 5121),
        )),
        (2, ((1137, 9), (1138, 9), (1, 10240), (2, 5121))),
        (1, ((2275, 9), (2560, 8), (5, 4096), (2276, 9), (2561, 8), (5, 4097))),
    )
    for channels, taps in sizes
    for layout in ("contiguous", "channels_last")
    for dtype in DTYPES
]  # fmt: skip

# Each way through the CUDA kernel with blocks of 256 threads: a group of 32, 64, 128 or 256 threads
# a filter, in small and in large blocks; through shared memory (in a dtype that is stored there
# otherwise than its sums, and with the spatial mean alone, so that no other barrier comes to help);
# in tiles; channel by channel; blocks of a plain tensor, the last of them shorter.
MEAN = Options(luma=0.0, exp_scale=False)
PATH_CASES = {
    "32": Case((9, 32, 3, 3)),
    "64": Case((5, 96, 3, 3), layout="channels_last"),
    "128": Case((3, 200, 3, 3)),
    "256": Case((2, 400, 3, 3)),
    "staged 32": Case((3, 5, 3, 3), torch.bfloat16, options=MEAN),
    "staged 64": Case((2, 95, 3, 3), torch.bfloat16, options=MEAN),
    "staged 256": Case((2, 455, 3, 3), options=MEAN),
    "staged 256, all parts": Case((2, 455, 3, 3)),
    "large 128": Case((2, 600, 3, 3), layout="channels_last"),
    "large 256": Case((1, 1200, 3, 3)),
    "staged large 256": Case((1, 1201, 3, 3), options=MEAN),
    "staged large 256, half": Case((1, 1201, 3, 3), torch.bfloat16, options=MEAN),
    "tiles": Case((1, 2300, 3, 3), layout="channels_last"),
    "tiles of single weights": Case((1, 2301, 3, 3), layout="channels_last"),
    "long channels": Case((1, 4, 5121)),
    "plain": Case((5121,), options=PLAIN),
}

PATH_CASES |= {
    f"{name}, of a given norm": replace(case, options=replace(case.options, grad_norm=0.1))
    for name, case in PATH_CASES.items()
    if name != "plain"
}

# A program takes Triton's interpreter a tenth of a second.
_INTERPRETED_OPTIONS = list(FILTER_OPTIONS.values())
INTERPRETED_CASES = [
    *(
        Case((1, channels, *kernel), torch.float32, *layouts, _INTERPRETED_OPTIONS[(i + j) % 3])
        for taps, kernel in KERNELS.items()
        for i, channels in enumerate(CHANNELS if taps < 25 else CHANNELS[::3])
        for j, layouts in enumerate(LAYOUTS)
    ),
    # Five shares no factor with the number of any option's values, so that all values meet.
    *(replace(case, shape=(1, 5, 3, 3)) for case in OPTION_CASES[::5]),
    *(
        case
        for case in OTHER_CASES
        if case.offset == 0 and case.shape[:1] != (64,) and math.prod(case.shape) <= 20_000
    ),
    # Longer than a tile.
    *(
        Case(shape, dtype, layout)
        for shape in ((1, 1032, 3, 3), (1, 531, 3, 3), (1, 600, 5, 1), (2, 2100, 1, 1))
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
    ),
    *(
        Case((2, 16, 3, 3), dtype, layout, options=options, offset=offset)
        for offset in (1, 4)
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
        for options in (Options(), PLAIN)
    ),
    Case((40,), options=replace(PLAIN, grad_norm=2.0), offset=1),
]
