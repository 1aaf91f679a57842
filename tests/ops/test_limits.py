"""czm_fused::step_ at the limits of its arithmetic, on every backend."""

import math

import pytest
import torch

from helpers.cases import PLAIN, Case, Options
from helpers.limits import CASES, LimitProblem
from helpers.problem import Problem
from helpers.step_backends import HOST, INTERPRETED, NATIVE, SIMULATED, available, on, parameter

on_native_backends = on(NATIVE)
# The same source as the others, and quick.
on_every_rule = on((*NATIVE, HOST, INTERPRETED))


def _cases(backend):
    if backend not in SIMULATED:
        return CASES
    # Triton's interpreter takes bfloat16's subnormals for zeros, and a case of PTX takes a second.
    cases = [case for case in CASES if case.dtype != torch.bfloat16 and case.options.nesterov]
    return cases if backend in (HOST, INTERPRETED) else cases[:1]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        parameter(backend, case, name=str(case))
        for backend in available((*NATIVE, *SIMULATED))
        for case in _cases(backend)
    ],
)
def test_filters_of_extreme_scale(case, backend):
    problem = LimitProblem(case, backend.device)
    backend.run([problem])
    problem.check_limits()


@on_every_rule
def test_a_gradient_spike_and_the_steps_after_it(backend):
    """The filter collapses to zeros and stays there; the others are trained."""
    problem = Problem(Case((3, 5, 3, 3), options=Options(momentum=0.0)), backend.device)
    grad = problem["grad"].clone()
    problem["param"][1], problem["grad"][1] = 1.0, 1e30
    for _ in range(3):
        backend.run([problem])
        problem["grad"].copy_(grad)
    outputs = problem.outputs()
    assert outputs["log_scale"][1] < -1e29
    assert torch.equal(outputs["param"][1], torch.zeros(5, 3, 3))
    assert outputs["param"].isfinite().all()
    assert not torch.equal(outputs["param"][[0, 2]], problem.inputs["param"][[0, 2]])


@on_every_rule
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_squared_norms_that_cannot_be_had(size, backend):
    """Filters that are not scaled are anchored only where their norm is known."""
    options = Options(exp_scale=False, momentum=0.0, luma=0.5, zmg=0.0)
    problem = Problem(Case((3, 5, 3, 3), options=options), backend.device)
    problem["param"][1] = size
    problem["grad"][1] = 0
    backend.run([problem])
    outputs = problem.outputs()
    assert outputs["param"].isfinite().all()
    # Less than lr * 2 * luma times the distance to the unit sphere.
    assert (outputs["param"][1] - size).abs().max() <= 0.11 * max(size, 1)


@on_every_rule
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite_stay_in_their_filter(value, backend):
    problem = Problem(Case((3, 5, 3, 3)), backend.device)
    problem["param"][1, 2, 0, 0] = value
    backend.run([problem])
    outputs = problem.outputs()
    assert not outputs["param"][1].isfinite().all()
    assert all(tensor[[0, 2]].isfinite().all() for tensor in outputs.values())


@on_native_backends
@pytest.mark.parametrize("lr", [1e-45, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_at_the_limits(lr, dtype, backend):
    """Weights without a gradient remain as they are."""
    for options in (PLAIN, Options(luma=0.0, momentum=0.0)):
        options = Options(**{**vars(options), "lr": lr, "momentum": 0.0})
        problem = Problem(Case((3, 5, 3, 3), dtype, options=options), backend.device)
        problem["grad"].zero_()
        backend.run([problem])
        torch.testing.assert_close(problem.outputs()["param"], problem.inputs["param"])


@on_native_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 17, 100, 100), (1, 3, 300, 330)])
def test_means_of_many_taps(shape, layout, backend):
    """What CZMG leaves of a gradient's mean does not grow with the number of taps."""
    options = Options(zmg=1.0, luma=0.0, exp_scale=False)
    problem = Problem(Case(shape, layout=layout, options=options), backend.device)
    problem["momentum_buffer"].zero_()
    problem["grad"].mul_(0.1).add_(1.0)
    backend.run([problem])
    taps = tuple(range(2, len(shape)))
    assert problem["momentum_buffer"].double().mean(dim=taps).abs().max() <= 4 * 2.0**-23
