"""How the steps on GPUs launch: how often, with what, and what they keep between steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from czm_fused import FusedCZMSGD
from czm_fused.ops.step import cuda
from czm_fused.ops.step.descriptors import DeviceScalar, Hyperparameters
from czm_fused.ops.step.device_table import DeviceTable
from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES
from helpers.cases import DTYPES, PLAIN, Case, Options
from helpers.planned import Planned
from helpers.problem import Problem, step_arguments
from helpers.stand_in import standing_in
from helpers.step_backends import CUDA_PTX, HOST, TRITON_PTX, WHOLE_HOST, on


@on((HOST, WHOLE_HOST))
def test_both_sides_agree_on_what_a_launch_holds(backend):
    from cuda_on_host import build

    kernels = build.kernels(backend.variant)
    assert (kernels.few_words, kernels.most_words) == (cuda.FEW_WORDS, cuda.MANY_WORDS)
    assert kernels.block_threads == build.VARIANTS[backend.variant].threads


@on((HOST, WHOLE_HOST))
def test_step_is_one_launch_for_all_groups_of_a_dtype(backend):
    cases = [
        Case(shape, dtype, layout, options=options)
        for shape, layout in (((3, 17, 3, 3), "channels_last"), ((4001,), "contiguous"))
        for dtype in DTYPES
        for options in (Options(lr=0.3), PLAIN)
    ]
    cases += [Case((0,)), Case((4, 2), options=Options(luma=0.3, nesterov=True))]
    problems = [Problem(case, seed=seed) for seed, case in enumerate(cases)]
    before = backend.step_class.launches
    backend.run(problems)
    assert backend.step_class.launches - before == len(DTYPES)
    for problem in problems:
        problem.check()


@on((HOST,))
@pytest.mark.parametrize(
    ("tensors", "a_group_each", "launches"), [(300, False, 1), (4080, False, 2), (481, True, 3)]
)
def test_step_of_many_tensors_is_split_into_few_launches(tensors, a_group_each, launches, backend):
    options = [Options(lr=0.1 * (n % 7), momentum=0.5) for n in range(tensors)]
    problems = [
        Problem(Case((2, 3, 3), options=options[n if a_group_each else 1]), seed=n % 5)
        for n in range(tensors)
    ]
    arguments = list(step_arguments(problems, backend.backend))
    if not a_group_each:
        arguments[8] = [0, 2] * (tensors // 2)
        arguments[9] = arguments[9][:3]
        arguments[9][2] = arguments[9][0]
    before = backend.step_class.launches
    backend.step(arguments)
    assert backend.step_class.launches - before == launches
    for problem in problems:
        problem.check()


@on((HOST,))
def test_the_operator_finds_its_plan_again(backend):
    made = []

    def make_step(tensors, device):
        made.append(tensors)
        return backend.step_class(tensors, device)

    cases = [Case((5, 17, 3, 3)), Case((7,), options=PLAIN)]
    with standing_in(make_step):
        # As a graph replays: other memory, other numbers, the same layouts.
        for seed in range(3):
            problems = [Problem(case, seed=seed) for case in cases]
            torch.ops.czm_fused.step_(*step_arguments(problems, backend.backend))
            for problem in problems:
                problem.check()
        assert len(made) == 1
        for others in (cases[:1], cases, cases[:1]):
            problems = [Problem(case) for case in others]
            torch.ops.czm_fused.step_(*step_arguments(problems, backend.backend))
    assert len(made) == 2


@on((HOST, WHOLE_HOST, CUDA_PTX, TRITON_PTX))
def test_hyperparameters_on_the_device(backend):
    options = Options(nesterov=True, luma=0.1), Options(luma=0.1, grad_norm=0.1)
    cases = [Case((5, 17, 3, 3), dtype, options=each) for dtype in DTYPES for each in options]
    cases.append(Case((7,), options=PLAIN))
    planned = Planned(backend.make_step(), backend.backend, cases)
    scalars = [torch.tensor(row, dtype=torch.float32) for row in planned.rows]
    for problem, row in zip(planned.problems, scalars, strict=True):
        # The oracle takes the numbers as float32 has them.
        values = dict(zip(HYPERPARAMETER_NAMES, row.tolist(), strict=True))
        rounded = {name: values[name] for name in ("lr", "momentum", "zmg", "luma", "grad_norm")}
        problem.case = replace(problem.case, options=replace(problem.case.options, **rounded))
    rows = [[DeviceScalar(x) for x in row] for row in scalars]
    planned.step(planned.grads, Hyperparameters(rows))
    for problem in planned.problems:
        problem.check()


@on((HOST, CUDA_PTX, TRITON_PTX))
def test_moved_gradients_are_found(backend):
    cases = [Case((1, 3, 3, 3)), Case((5,), options=PLAIN)]
    planned = Planned(backend.make_step(), backend.backend, cases)
    hyperparameters = Hyperparameters(planned.rows)
    grads = planned.grads
    moved = [grad.clone() for grad in grads]
    for where in (grads, moved, grads):
        for other in (*grads, *moved):
            other.fill_(math.nan)
        for grad, problem in zip(where, planned.problems, strict=True):
            grad.copy_(torch.linspace(-1, 1, grad.numel()).view(grad.shape))
            problem.remember()
            problem.inputs["grad"] = grad.clone()
        planned.step(where, hyperparameters)
        for problem in planned.problems:
            problem["grad"].copy_(problem.inputs["grad"])
            problem.check()


def test_tables_are_sent_when_they_changed():
    table = DeviceTable(3, torch.device("cpu"))
    words = np.array([1, 2, 3])
    sent = table.send(words)
    assert table.send(words.copy()) is sent
    assert table.send(words + 1).tolist() == [2, 3, 4]
    # A kernel may still read what was sent before.
    assert sent.tolist() == [1, 2, 3]


def train(backend, memory_format):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 2),
    ).to(torch.float64, memory_format=memory_format)
    optimizer = FusedCZMSGD(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    images = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, [param.detach() for param in model.parameters()]


@on((HOST, TRITON_PTX, CUDA_PTX))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_as_the_reference_trains(memory_format, backend):
    expected_losses, expected = train("reference", memory_format)
    with standing_in(backend.make_step()):
        losses, params = train(backend.backend, memory_format)
    # Float64: rounding of 1e-16 a step against updates of size 1, four steps long.
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
    assert losses[-1] < losses[0]
