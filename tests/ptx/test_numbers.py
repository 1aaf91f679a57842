"""What decides how fast a step is, as numbers that its PTX tells: no more than `bounds.py` says."""

import math

import pytest
import torch

from czm_fused import FusedCZMSGD
from czm_fused.models import cifar_resnet
from czm_fused.ops.step.descriptors import DeviceScalar, Hyperparameters
from helpers.cases import PLAIN, Case, Options
from helpers.planned import Planned
from helpers.problem import GuardedMemory
from helpers.stand_in import standing_in
from helpers.step_backends import CUDA_PTX, TRITON_PTX, available, on, parameter
from ptx.bounds import CASES, LOADS_BEFORE_WEIGHT, UNDER_HALF_FULL, Numbers
from ptx.recorder import Recorder
from ptx.traffic import WEIGHTS, Traffic

pytestmark = pytest.mark.simulated

on_both = on((CUDA_PTX, TRITON_PTX))


def observing(backend):
    """Return a step that is observed, and what observes it."""
    traffic = Traffic()
    recorder = Recorder(observer=traffic)
    return type("ObservedStep", (backend.step_class,), {"recorder": recorder}), traffic


def measure(backend, case):
    """Return the numbers of a case, as `bounds.py` has them."""
    step_class, traffic = observing(backend)
    planned = Planned(step_class, backend.backend, [case])
    planned.step(planned.grads, Hyperparameters(planned.rows))
    size = math.prod(case.shape) * case.dtype.itemsize
    names = [name for name in WEIGHTS if name in traffic.loads]
    return Numbers(
        sectors=max(traffic.sectors(name, size) for name in names),
        # A request of a warp is 512 bytes at best.
        requests=max(traffic.loads[name].requests * 512 / size for name in names),
        loads_a_wait=traffic.loads_a_wait(),
    )


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
    bound, found = bounds[backend.backend], measure(backend, case)
    print(f"{name}, {backend}: {found}")
    assert found.sectors <= bound.sectors
    assert found.requests <= bound.requests
    assert found.loads_a_wait >= bound.loads_a_wait


@on((CUDA_PTX,))
@pytest.mark.parametrize("shape", [(4, 512, 3, 3), (1, 1280, 4, 4)])
def test_a_misaligned_gradient_slows_no_other_tensor(shape, backend):
    step_class, traffic = observing(backend)
    planned = Planned(step_class, backend.backend, [Case(shape)])
    memory = GuardedMemory(planned.grads[0], "contiguous", 1)
    planned.problems[0].memory["grad"] = memory
    planned.step([memory.tensor], Hyperparameters(planned.rows))
    size = memory.tensor.nbytes
    requests = {name: traffic.loads[name].requests * 512 / size for name in WEIGHTS[:3]}
    assert requests.pop("grad") > 2
    assert set(requests.values()) == {1}


@on_both
@pytest.mark.parametrize("situation", LOADS_BEFORE_WEIGHT)
@pytest.mark.parametrize(
    ("shape", "options", "offset", "is_slow"),
    [
        ((2, 64, 3, 3), Options(nesterov=True), 0, False),
        ((2, 64, 3, 3), Options(nesterov=True), 1, True),
        ((4096,), PLAIN, 1, True),
        ((1, 2560, 3, 3), Options(nesterov=True), 0, True),
    ],
    ids=["held", "misaligned", "plain and misaligned", "read twice"],
)
def test_loads_before_the_first_weight(shape, options, offset, is_slow, situation, backend):
    step_class, traffic = observing(backend)
    case = Case(shape, offset=offset, options=options)
    planned = Planned(step_class, backend.backend, [case])
    rows, scales = planned.rows, ()
    if situation == "GradScaler and a rate on the device":
        rows = [[DeviceScalar(torch.tensor(row[0])), *row[1:]] for row in rows]
        scales = torch.tensor(2.0), torch.tensor(0.0)
    planned.step(planned.grads, Hyperparameters(rows), *scales)
    print(f"{situation}, {backend}: {traffic.loads_before_weight()}")
    bound = LOADS_BEFORE_WEIGHT[situation][backend.backend][is_slow]
    assert traffic.loads_before_weight() <= bound


@on_both
@pytest.mark.parametrize("depth", [8, pytest.param(110, marks=pytest.mark.exhaustive)])
def test_blocks_under_half_full(depth, backend):
    torch.manual_seed(0)
    model = cifar_resnet(depth, residual_bias=True)
    for param in model.parameters():
        param.grad = 0.01 * torch.randn_like(param)
    step_class, traffic = observing(backend)
    with standing_in(step_class):
        optimizer = FusedCZMSGD(model.parameters(), lr=0.1, backend=backend.backend)
        optimizer.step()
    print(f"{depth}, {backend}: {traffic.share_under_half_full()} of {len(traffic.blocks)}")
    assert traffic.share_under_half_full() <= UNDER_HALF_FULL[backend.backend]
