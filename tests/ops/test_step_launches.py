"""The CUDA kernels' own source, run on the host, against the oracles."""

import math

import pytest
import torch
from host_kernels import BLOCK_THREADS, HostStep, load, make_host_runner

from czm_fused.ops import add_relu_noise, exp_scale
from czm_fused.ops.step import operator, plan
from czm_fused.ops.step.cuda import _MOST_WORDS
from czm_fused.ops.step.descriptors import DeviceScalar, Hyperparameters, StepTensor
from czm_fused.ops.step.plan import DevicePlan
from czm_fused.ops.step.spec import DTYPES as DTYPE_NUMBERS
from helpers.cases import (
    DTYPES,
    OPTION_CASES,
    OTHER_CASES,
    PLAIN,
    SHAPE_CASES,
    Case,
    Options,
    Problem,
    run,
    step_arguments,
)


@pytest.fixture(scope="module")
def kernels(build_host_kernels):
    return load(build_host_kernels("plain"))


@pytest.fixture
def cuda_step(kernels, monkeypatch):
    """Puts the host's run of the CUDA step in the place of the backend `cpu`."""
    monkeypatch.setattr(HostStep, "kernels", kernels, raising=False)
    monkeypatch.setattr(HostStep, "launches", 0)
    monkeypatch.setattr(plan, "make_runner", make_host_runner)
    monkeypatch.setattr(operator, "_PLANS", [])
    return HostStep


def make_step(problems, *scales):
    run(problems, "cpu", *scales)


def test_both_sides_agree_on_what_a_launch_holds(kernels):
    assert kernels.most_words == _MOST_WORDS
    assert kernels.block_threads == BLOCK_THREADS


@pytest.mark.parametrize("case", [*OPTION_CASES, *OTHER_CASES, *SHAPE_CASES], ids=str)
def test_step(case, cuda_step):
    problem = Problem(case)
    make_step([problem])
    problem.check()


# At and around what a warp, two warps and a tile can hold, and whole and broken packs.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "taps"),
    [
        (71, 9),
        (72, 9),
        (142, 9),
        (143, 9),
        (192, 9),
        (427, 3),
        (1300, 2),
        (50, 49),
        (8, 640),
        (3, 1280),
        (2, 1281),
        (2, 1536),
        (1, 2000),
    ],
)
def test_step_of_filters_around_what_a_team_holds(channels, taps, layout, dtype, cuda_step):
    problem = Problem(Case((3, channels, taps), dtype, layout))
    make_step([problem])
    problem.check()


def test_step_is_one_launch_for_all_groups_and_dtypes(cuda_step):
    cases = [
        Case(shape, dtype, layout, options=options)
        for shape, layout in (((3, 17, 3, 3), "channels_last"), ((4001,), "contiguous"))
        for dtype in DTYPES
        for options in (Options(lr=0.3), PLAIN)
    ]
    cases += [Case((0,)), Case((4, 2), options=Options(luma=0.3, nesterov=True))]
    problems = [Problem(case, seed=seed) for seed, case in enumerate(cases)]
    make_step(problems)
    assert cuda_step.launches == 1
    for problem in problems:
        problem.check()


@pytest.mark.parametrize(
    ("tensors", "a_group_each", "launches"), [(300, False, 1), (4080, False, 2), (481, True, 3)]
)
def test_step_of_many_tensors_is_split_into_few_launches(
    tensors, a_group_each, launches, cuda_step
):
    options = [Options(lr=0.1 * (n % 7), momentum=0.5) for n in range(tensors)]
    problems = [
        Problem(Case((2, 3, 3), options=options[n if a_group_each else 1]), seed=n % 5)
        for n in range(tensors)
    ]
    arguments = list(step_arguments(problems, "cpu"))
    if not a_group_each:
        arguments[8] = [0, 2] * (tensors // 2)
        arguments[9] = arguments[9][:3]
        arguments[9][2] = arguments[9][0]
    torch.ops.czm_fused.step_(*arguments)
    assert cuda_step.launches == launches
    for problem in problems:
        problem.check()


def test_hyper_parameters_are_read_where_they_live(cuda_step):
    problems = [
        Problem(Case((5, 17, 3, 3), dtype, options=Options(nesterov=True, luma=0.1)))
        for dtype in DTYPES
    ]
    row = [torch.tensor(value, dtype=torch.float32) for value in problems[0].case.options.row()]
    hyperparameters = Hyperparameters([[DeviceScalar(x) for x in row]])
    tensors = [StepTensor.of(problem["param"], problem.case.flags, 0) for problem in problems]
    device_plan = DevicePlan(tensors, torch.device("cpu"), "cpu")
    states = [{name: memory.tensor for name, memory in problem.memory.items()}
              for problem in problems]
    params, grads = ([problem[name] for problem in problems] for name in ("param", "grad"))
    inputs = device_plan.read(params, grads, states)
    device_plan.run(inputs, hyperparameters, None, None)
    for problem in problems:
        # The bounds allow for hyper-parameters rounded to float32, but not in float64.
        if problem.case.dtype != torch.float64:
            problem.check()


@pytest.mark.parametrize("grad_scale", [1024.0, 3.0])
def test_gradients_are_divided_by_the_scale(grad_scale, cuda_step):
    problems = [Problem(Case(shape, dtype)) for shape in ((3, 17, 3, 3), (40,)) for dtype in DTYPES]
    make_step(problems, torch.tensor(grad_scale), torch.tensor(0.0))
    for problem in problems:
        problem.check(grad_scale)


def test_nothing_changes_where_an_infinity_was_found(cuda_step):
    problem = Problem(Case((3, 17, 3, 3)))
    make_step([problem], torch.tensor(2.0), torch.tensor(2.0))
    for name, value in problem.outputs().items():
        assert torch.equal(value, problem.inputs[name])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(9, 17, 3, 3), (5, 200, 3, 3), (3, 64, 1, 1)])
def test_what_is_not_finite_stays_in_its_filter(shape, value, cuda_step):
    problem = Problem(Case(shape))
    clean = problem.expected()
    problem["grad"][2, 3].view(-1)[0] = value
    problem.remember()
    make_step([problem])
    outputs = problem.outputs()
    assert not outputs["param"][2].isfinite().all()
    others = [n for n in range(shape[0]) if n != 2]
    for name, expected in clean.items():
        found = outputs[name][others].double()
        assert torch.allclose(found, expected[others], rtol=1e-4, atol=1e-5)


def test_step_gives_the_same_bits_again(cuda_step):
    cases = [
        Case(shape, dtype)
        for shape in ((40, 33, 3, 3), (3, 5001), (2, 2000, 5))
        for dtype in DTYPES
    ]

    def outputs():
        problems = [Problem(case, seed=seed) for seed, case in enumerate(cases)]
        make_step(problems)
        return [tensor for problem in problems for tensor in problem.outputs().values()]

    for a, b in zip(outputs(), outputs(), strict=True):
        assert torch.equal(a, b)


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def tolerance(dtype, expected, roundings=8):
    """Some roundings of the arithmetic, and one of the stored type."""
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return (roundings * arithmetic + torch.finfo(dtype).eps) * expected.abs().double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 5, 7), torch.contiguous_format),
        ((2, 3, 5, 7), torch.channels_last),
        ((3, 8, 16, 16), torch.contiguous_format),
        ((3, 8, 16, 16), torch.channels_last),
        ((4, 5), torch.contiguous_format),
    ],
)
def test_add_relu_noise(shape, layout, offset, with_residual, with_noise, is_wide, dtype, kernels):
    generator = torch.Generator().manual_seed(0)

    def activation():
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        strides = values.to(memory_format=layout).stride()
        memory = torch.full((values.numel() + 2 * offset + 8,), math.nan, dtype=dtype)
        return memory.as_strided(shape, strides, offset).copy_(values)

    x, grad, output, grad_input = (activation() for _ in range(4))
    residual = activation() if with_residual else None
    noise = None
    if with_noise:
        noise = torch.empty(shape[:2], dtype=torch.promote_types(dtype, torch.float32))
        noise.uniform_(0.5, 1.5, generator=generator)
    area = math.prod(shape[2:])
    geometry = (x.numel(), shape[1], area, area == 1 or not x.is_contiguous(), is_wide)
    kernels.add_relu_noise(
        DTYPE_NUMBERS[dtype],
        address(output),
        address(x),
        address(residual),
        address(noise),
        *geometry,
    )
    expected = add_relu_noise.reference.add_relu_noise(
        x.double(),
        residual if residual is None else residual.double(),
        noise if noise is None else noise.double(),
    )
    size = add_relu_noise.reference.add_relu_noise(
        x.double().abs(),
        residual if residual is None else residual.double().abs(),
        noise if noise is None else noise.double(),
    )
    assert ((output.double() - expected).abs() <= tolerance(dtype, size)).all()

    kernels.add_relu_noise_backward(
        DTYPE_NUMBERS[dtype],
        address(grad_input),
        address(grad),
        address(output),
        address(noise),
        *geometry,
    )
    expected = add_relu_noise.reference.add_relu_noise_backward(
        grad.double(), output.double(), noise if noise is None else noise.double()
    )
    assert ((grad_input.double() - expected).abs() <= tolerance(dtype, expected)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (2, 5, 3), (4, 1), (2, 40, 5, 5)])
def test_exp_scale(shape, dtype, kernels):
    generator = torch.Generator().manual_seed(0)
    real = torch.promote_types(dtype, torch.float32)
    v, dw = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    g = torch.randn(shape[0], generator=generator, dtype=torch.float64).to(real)
    weight, dv, dg = torch.empty_like(v), torch.empty_like(v), torch.empty_like(g)
    sizes = (shape[0], v[0].numel())
    kernels.exp_scale(DTYPE_NUMBERS[dtype], address(weight), address(v), address(g), *sizes)
    kernels.exp_scale_backward(
        DTYPE_NUMBERS[dtype], address(dv), address(dg), address(dw), address(v), address(g), *sizes
    )
    expected = exp_scale.reference.exp_scale(v.double(), g.double())
    expected_dv, expected_dg = exp_scale.reference.exp_scale_backward(
        dw.double(), v.double(), g.double()
    )
    assert ((weight.double() - expected).abs() <= tolerance(dtype, expected)).all()
    assert ((dv.double() - expected_dv).abs() <= tolerance(dtype, expected_dv)).all()
    terms = g.double().exp() * (dw.double() * v.double()).abs().flatten(1).sum(1)
    assert ((dg.double() - expected_dg).abs() <= tolerance(real, terms)).all()
