"""What decides how fast a step is, as numbers that its PTX tells: no more than `bounds.py` says."""

import math

import pytest
import torch

from czm_fused import FusedCZMSGD
from czm_fused.models import cifar_resnet
from helpers.cases import Case, Options
from helpers.problem import Problem, step_arguments
from helpers.stand_in import standing_in
from helpers.step_backends import CUDA_PTX, TRITON_PTX, available, on, parameter
from ptx.bounds import CASES, LOADS_BEFORE_WEIGHT, UNDER_HALF_FULL
from ptx.recorder import Recorder
from ptx.traffic import WEIGHTS, Traffic

pytestmark = pytest.mark.simulated

on_both = on((CUDA_PTX, TRITON_PTX))


def observed(backend, arguments, **options):
    """Make a step, and return its traffic."""
    traffic = Traffic()
    recorder = Recorder(observer=traffic, **options)
    step_class = type("ObservedStep", (backend.step_class,), {"recorder": recorder})
    with standing_in(step_class):
        torch.ops.czm_fused.step_(*arguments)
    return traffic


def measure(backend, case):
    """Return the numbers of a case, as `bounds.py` has them."""
    traffic = observed(backend, step_arguments([Problem(case)], backend.backend))
    size = math.prod(case.shape) * case.dtype.itemsize
    names = [name for name in WEIGHTS if name in traffic.loads]
    return {
        "sectors": max(traffic.sectors(name, size) for name in names),
        # A request of a warp is 512 bytes at best.
        "requests": max(traffic.loads[name].requests * 512 / size for name in names),
        "loads_a_wait": traffic.loads_a_wait(),
    }


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        parameter(backend, name, name=name)
        for backend in available((CUDA_PTX, TRITON_PTX))
        for name in CASES
    ],
)
def test_traffic(name, backend):
    case, bounds = CASES[name]
    bound = bounds[backend.backend]
    found = measure(backend, case)
    print(name, backend, {key: round(value, 2) for key, value in found.items()})
    assert found["sectors"] <= bound.sectors
    assert found["requests"] <= bound.requests
    assert found["loads_a_wait"] >= bound.loads_a_wait


@on_both
@pytest.mark.parametrize("situation", LOADS_BEFORE_WEIGHT)
def test_loads_before_the_first_weight(situation, backend):
    problems = [Problem(Case((2, 64, 3, 3), options=Options(nesterov=True)))]
    scales = (torch.tensor(2.0), torch.tensor(0.0)) if "scaler" in situation else ()
    arguments = list(step_arguments(problems, backend.backend, *scales))
    if "capturable" in situation:
        arguments[9] = _on_device(arguments[9])
    traffic = observed(backend, arguments)
    print(situation, backend, traffic.loads_before_weight())
    assert traffic.loads_before_weight() <= LOADS_BEFORE_WEIGHT[situation][backend.backend]


def _on_device(hyperparameters):
    return hyperparameters


@on_both
@pytest.mark.parametrize(
    "depth", [20, pytest.param(110, marks=pytest.mark.exhaustive)], ids=lambda depth: f"resnet{depth}"
)
def test_blocks_under_half_full(depth, backend):
    torch.manual_seed(0)
    model = cifar_resnet(depth)
    for param in model.parameters():
        param.grad = 0.01 * torch.randn_like(param)
    traffic = Traffic()
    recorder = Recorder(observer=traffic)
    step_class = type("ObservedStep", (backend.step_class,), {"recorder": recorder})
    with standing_in(step_class):
        optimizer = FusedCZMSGD(model.parameters(), lr=0.1, backend=backend.backend)
        optimizer.step()
    print(depth, backend, len(traffic.blocks), traffic.share_under_half_full())
    assert traffic.share_under_half_full() <= UNDER_HALF_FULL[backend.backend]
