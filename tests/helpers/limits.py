"""Filters whose scale, squared norm or rate is at the limits of its arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from helpers.cases import Case, Options
from helpers.problem import Problem

# Around where exp(g), 1 / exp(g) and <W, W> cease to be normal numbers, and far beyond.
LOG_SCALES = {
    torch.float32: (
        -math.inf, -1e30, -150.0, -110.0, -104.0, -103.5, -103.0, -95.0, -89.0, -88.0, -87.0, -60.0,
        -48.0, 40.0, 60.0, 85.0,
    ),
    torch.float64: (
        -math.inf, -1e300, -800.0, -745.5, -744.0, -730.0, -710.0, -708.0, -707.0, -500.0, -360.0,
        350.0, 500.0, 700.0,
    ),
}  # fmt: skip
LOG_SCALES[torch.bfloat16] = LOG_SCALES[torch.float32]
DECAY = 0.1
OPTIONS = (
    Options(),
    Options(nesterov=True, weight_decay=DECAY),
    Options(momentum=0.0, luma=0.0),
)
CASES = [
    Case((len(LOG_SCALES[dtype]), 17, 3, 3), dtype, layout, options=options)
    for dtype in (torch.float32, torch.float64)
    for layout in ("contiguous", "channels_last")
    for options in OPTIONS
] + [
    Case((len(LOG_SCALES[torch.float32]), 17, 3, 3), torch.bfloat16, master_weights=True),
]


class LimitProblem(Problem):
    """A case of `CASES`, and what a literal step of V and g, kept of their own, makes of it."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        super().__init__(replace(case, master_weights=False), device)
        self.case = case
        g = torch.tensor(LOG_SCALES[case.dtype], dtype=torch.float64)
        self.directions = self.inputs["param"].double() / self._scale(self.inputs["log_scale"])
        weights = self._scale(g) * self.directions
        self["param"].copy_(weights)
        self["log_scale"].copy_(g)
        # Where the scale is large the gradients are small, as those of a finite loss.
        self["grad"].mul_(self._scale(g.clamp(min=0).neg()) ** 2)
        if case.master_weights:
            twin = Problem(case, device)
            self.memory["param_remainder"] = twin.memory["param_remainder"]
            self["param_remainder"].zero_()
            self.directions = self["param"].double() / self._scale(g)
            self.directions[~self.directions.isfinite()] = 0
        self.remember()

    def _scale(self, g: Tensor) -> Tensor:
        return g.double().exp().view(-1, 1, 1, 1)

    def check_limits(self) -> None:
        """Assert that weights are numbers, and those that the literal step gives."""
        options, x = self.case.options, self.inputs
        directions, g = self.directions, x["log_scale"].double()
        grads = x["grad"].double() * self._scale(g)
        norms = directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        anchor = torch.where(norms > 0, 2 * options.luma * (norms - 1) / norms, 0) * directions
        grads = grads + anchor
        grads = grads - options.zmg * grads.mean(dim=(2, 3), keepdim=True)
        grads = grads + options.weight_decay * directions
        log_scale_grads = (x["grad"].double() * x["param"].double()).flatten(1).sum(dim=1)
        steps = [
            _momentum_step(grads, x.get("momentum_buffer"), options),
            _momentum_step(log_scale_grads, x.get("log_scale_momentum_buffer"), options),
        ]
        log_scale = g - options.lr * steps[1]
        weights = self._scale(log_scale) * (directions - options.lr * steps[0])

        outputs = self.outputs()
        assert outputs["param"].isfinite().all(), self.case
        assert outputs["momentum_buffer"].isfinite().all() if options.momentum else True
        torch.testing.assert_close(
            outputs["log_scale"].double(), log_scale, rtol=1e-5, atol=1e-5
        )
        # A direction that is lost is neither anchored nor decayed, and subnormal weights have few
        # bits; those of the half type are rounded besides.
        lost = options.lr * (2 * anchor.abs() + 2 * options.weight_decay * directions.abs())
        info = torch.finfo(self.case.dtype)
        spacing = 4 * torch.finfo(torch.float32).smallest_normal * 2.0**-23
        if self.case.dtype == torch.float64:
            spacing = 4 * 5e-324
        elif self.case.dtype == torch.bfloat16:
            spacing = 4 * info.smallest_normal * info.eps
        relative = max(1e-4, info.eps)
        bound = self._scale(log_scale) * (lost + relative * (1 + directions.abs())) + spacing
        error = (outputs["param"].double() - weights).abs()
        assert (error <= bound).all(), (
            f"{self.case}: wrong for g of {g[(error > bound).flatten(1).any(dim=1)].tolist()}, by "
            f"{(error / bound).max():.3g} bounds"
        )


def _momentum_step(grad: Tensor, buffer: Tensor | None, options: Options) -> Tensor:
    if buffer is None:
        return grad
    averaged = options.momentum * buffer.double() + grad
    return grad + options.momentum * averaged if options.nesterov else averaged
