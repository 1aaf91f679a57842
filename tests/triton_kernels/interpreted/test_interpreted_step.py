"""The step's kernel against the oracle, on the CPU."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.cases import (
    CHANNELS,
    FILTER_OPTIONS,
    KERNELS,
    LAYOUTS,
    OPTION_CASES,
    OTHER_CASES,
    PLAIN,
    Case,
    Options,
    Problem,
    run,
)

from czm_fused import FusedCZMSGD
from czm_fused.ops.step.descriptors import DeviceScalar, Hyperparameters, StepTensor
from czm_fused.ops.step.device_table import DeviceTable
from czm_fused.ops.step.plan import DevicePlan
from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES

# A program takes the interpreter a tenth of a second, so every launch takes many cases.
_MOST_WEIGHTS = 20_000

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(cases, **scaler):
    problems = [Problem(case) for case in cases]
    run(problems, "triton", **scaler)
    for problem in problems:
        problem.check(float(scaler.get("grad_scale", 1.0)))


@pytest.mark.parametrize("taps", KERNELS)
def test_shapes_and_layouts(taps):
    options = list(FILTER_OPTIONS.values())
    check(
        Case((1, channels, *KERNELS[taps]), torch.float32, *layouts, options[(i + j) % 3])
        for i, channels in enumerate(CHANNELS if taps < 25 else CHANNELS[::3])
        for j, layouts in enumerate(LAYOUTS)
    )


# Five shares no factor with the number of any option's values, so that all values meet.
@pytest.mark.parametrize("first", range(0, len(OPTION_CASES[::5]), 15))
def test_options(first):
    cases = OPTION_CASES[::5][first : first + 15]
    check(replace(case, shape=(1, 5, 3, 3)) for case in cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_cases(dtype):
    check(
        case
        for case in OTHER_CASES
        if case.dtype == dtype
        and case.offset == 0
        and case.shape[:1] != (64,)
        and math.prod(case.shape) <= _MOST_WEIGHTS
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_filters_longer_than_a_tile(dtype, layout):
    shapes = [(1, 1032, 3, 3), (1, 531, 3, 3), (1, 600, 5, 1), (2, 2100, 1, 1)]
    check(Case(shape, dtype, layout) for shape in shapes)


@pytest.mark.parametrize("offset", [1, 4])
def test_offset_memory(offset):
    check(
        Case((2, 16, 3, 3), dtype, layout, options=options, offset=offset)
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last")
        for options in (Options(), PLAIN)
    )


def test_scaler():
    case = Case((2, 3, 3, 3))
    check([case], grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
    problem = Problem(case)
    run([problem], "triton", found_inf=torch.tensor(2.0))
    for name, actual in problem.outputs().items():
        assert torch.equal(actual, problem.inputs[name])


def test_filter_of_zeros_has_no_anchor():
    problem = Problem(Case((2, 3, 3, 3)))
    problem["param"][0] = 0
    problem["log_scale"][0] = 0
    problem.remember()
    run([problem], "triton")
    problem.check()


def make_step(cases):
    """Return a step of the cases' tensors, their problems, and the rows of their groups."""
    problems = [Problem(case) for case in cases]
    tensors = [
        StepTensor.of(problem["param"], problem.case.flags, index)
        for index, problem in enumerate(problems)
    ]
    plan = DevicePlan(tensors, torch.device("cpu"), "triton")
    states = [
        {name: memory.tensor for name, memory in problem.memory.items()} for problem in problems
    ]

    def step(grads, hyperparameters):
        inputs = plan.read([problem["param"] for problem in problems], grads, states)
        plan.run(inputs, hyperparameters, None, None)

    grads = [problem["grad"] for problem in problems]
    return step, problems, grads, [problem.case.options.row() for problem in problems]


def test_hyperparameters_on_the_device():
    cases = [Case((2, 3, 3, 3)), Case((2, 3, 3, 3), torch.float64), Case((7,), options=PLAIN)]
    step, problems, grads, rows = make_step(cases)
    scalars = [torch.tensor(row, dtype=torch.float32) for row in rows]
    for problem, row in zip(problems, scalars, strict=True):
        # The oracle takes the numbers as float32 has them.
        values = dict(zip(HYPERPARAMETER_NAMES, row.tolist(), strict=True))
        options = {name: values[name] for name in ("lr", "momentum", "zmg", "luma")}
        problem.case = replace(problem.case, options=replace(problem.case.options, **options))
    step(grads, Hyperparameters([[DeviceScalar(x) for x in row] for row in scalars]))
    for problem in problems:
        problem.check()


def test_moved_gradients_are_found():
    step, problems, grads, rows = make_step([Case((1, 3, 3, 3)), Case((5,), options=PLAIN)])
    hyperparameters = Hyperparameters(rows)
    moved = [grad.clone() for grad in grads]
    for where in (grads, moved, grads):
        for other in (*grads, *moved):
            other.fill_(math.nan)
        for grad, problem in zip(where, problems, strict=True):
            grad.copy_(torch.linspace(-1, 1, grad.numel()).view(grad.shape))
            problem.remember()
            problem.inputs["grad"] = grad.clone()
        step(where, hyperparameters)
        for problem in problems:
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


def test_steps_of_the_same_bits():
    case = Case((2, 17, 3, 3))
    problems = [Problem(case), Problem(case)]
    for problem in problems:
        run([problem], "triton")
    first, second = (problem.outputs() for problem in problems)
    for name in first:
        assert torch.equal(first[name], second[name])


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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_as_the_reference_trains(memory_format):
    losses, params = train("triton", memory_format)
    expected_losses, expected = train("reference", memory_format)
    # Float64: rounding of 1e-16 a step against updates of size 1, four steps long.
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
    assert losses[-1] < losses[0]
