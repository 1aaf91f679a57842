"""czm_fused::step_ on every backend against the oracle: one matrix, the backend a parameter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from czm_fused.ops.step.spec import HYPERPARAMETER_NAMES
from helpers.cases import (
    DTYPES,
    GROUP_CASES,
    INTERPRETED_CASES,
    LAYOUTS,
    OPTION_CASES,
    OTHER_CASES,
    PATH_CASES,
    PLAIN,
    SHAPE_CASES,
    Case,
    Options,
)
from helpers.problem import GuardedMemory, Problem, step_arguments
from helpers.step_backends import (
    BACKENDS,
    CPU,
    CUDA_PTX,
    HOST,
    INTERPRETED,
    NATIVE,
    REFERENCE,
    TRITON_PTX,
    WHOLE_HOST,
    available,
    on,
    parameter,
)

PARAMS, GRADS, MOMENTUM, LOG_SCALES, LOG_SCALE_MOMENTUM, STEPS = range(6)
REMAINDERS, FLAGS, GROUPS, HYPER = range(6, 10)

on_every_backend = on(BACKENDS)
# What the operator does around the kernel needs no kernel of a GPU.
on_native_backends = on(NATIVE)


@pytest.mark.parametrize("backend", [parameter(backend) for backend in BACKENDS])
def test_backend_is_tested_here(backend):
    """The matrix collects what can run; this one says why the rest is not in it."""
    if backend.obstacle is not None:
        pytest.skip(backend.obstacle)


EVERY_CASE = [*OPTION_CASES, *OTHER_CASES, *SHAPE_CASES, *GROUP_CASES, *PATH_CASES.values()]


def _cases(backend):
    """Return the cases that `backend` always runs."""
    if backend is REFERENCE:
        # It has no loops of its own that shapes could break.
        return OPTION_CASES + OTHER_CASES
    if backend is INTERPRETED:
        return INTERPRETED_CASES
    if backend is WHOLE_HOST:
        # A small block does the rest as well, and quicker.
        cases = [*GROUP_CASES, *PATH_CASES.values(), *EVERY_CASE[::60]]
        return [case for case in cases if math.prod(case.shape) <= 100_000]
    if backend in (CUDA_PTX, TRITON_PTX):
        return [case for case in _exhaustive_cases(backend) if case in _SAMPLE]
    return EVERY_CASE


# Every path in every dtype and layout, and of the rest what makes no new path.
_SAMPLE = {
    *PATH_CASES.values(),
    *(case for case in GROUP_CASES if case.shape[1:] in ((142, 9), (285, 9), (570, 9), (2, 2561))),
    *(case for case in OTHER_CASES if case.master_weights and case.shape[1:] in ((17, 3, 3),)),
    *EVERY_CASE[::23],
}


def _exhaustive_cases(backend):
    """Return the cases of `make ptx-check`, which takes a tenth of a second for each."""
    if backend is CUDA_PTX:
        return [case for case in EVERY_CASE if math.prod(case.shape) <= 400_000]
    if backend is TRITON_PTX:
        # A lane adds up the taps of a channel one by one, which takes seconds for thousands.
        return [
            case
            for case in EVERY_CASE
            if math.prod(case.shape) <= 40_000 and math.prod(case.shape[2:]) <= 200
        ]
    return []


def _matrix():
    for backend in available(BACKENDS):
        always = dict.fromkeys(_cases(backend))
        for case in always:
            yield parameter(backend, case, name=str(case))
        for case in dict.fromkeys(_exhaustive_cases(backend)):
            if case not in always:
                yield parameter(backend, case, name=str(case), marks=[pytest.mark.exhaustive])


@pytest.mark.parametrize(("case", "backend"), list(_matrix()))
def test_step(case, backend):
    problem = Problem(case, backend.device)
    backend.run([problem])
    problem.check()


# Filters of a warp, of a large block and in tiles; each tensor is moved as its own address allows.
@on((CPU, HOST, CUDA_PTX, TRITON_PTX))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["param", "grad", "momentum_buffer"])
@pytest.mark.parametrize("shape", [(3, 32, 3, 3), (1, 1200, 3, 3), (1, 2300, 3, 3)])
def test_step_of_tensors_of_which_one_is_misaligned(shape, name, dtype, backend):
    problem = Problem(Case(shape, dtype), backend.device)
    problem.memory[name] = GuardedMemory(problem[name], "contiguous", 1)
    backend.run([problem])
    problem.check()


@on_every_backend
def test_step_of_many_groups_and_dtypes_in_one_call(backend):
    cases = random.Random(0).sample(OPTION_CASES, 20)
    cases += [
        Case(shape, dtype, layout, options=options)
        for shape, layout in (((3, 17, 3, 3), "channels_last"), ((40_001,), "contiguous"))
        for dtype in DTYPES
        for options in (Options(lr=0.3), PLAIN)
    ]
    cases += [Case((0,)), Case((0, 3, 3, 3)), Case((4, 2), options=Options(luma=0.3))]
    random.Random(1).shuffle(cases)
    problems = [Problem(case, backend.device, seed) for seed, case in enumerate(cases)]
    backend.run(problems)
    for problem in problems:
        problem.check()


@on_native_backends
def test_step_of_no_tensors(backend):
    hyperparameters = torch.zeros(1, len(HYPERPARAMETER_NAMES), dtype=torch.float64)
    backend.step([[], [], [], [], [], [], [], [], [], hyperparameters, backend.backend])


@on((*NATIVE, HOST))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_step_of_any_shape(backend, data):
    draw = data.draw
    kernel = draw(st.lists(st.integers(1, 8), min_size=0, max_size=3))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 70)), *kernel)
    layout, grad_layout = draw(st.sampled_from(LAYOUTS))
    momentum = draw(st.sampled_from((0.0, 0.9)))
    case = Case(
        shape,
        draw(st.sampled_from(DTYPES)),
        layout,
        grad_layout,
        Options(
            momentum=momentum,
            nesterov=bool(momentum) and draw(st.booleans()),
            weight_decay=draw(st.sampled_from((0.0, 0.1))),
            zmg=draw(st.floats(0, 1)),
            luma=draw(st.sampled_from((0.0, 5e-4, 1.0))),
            grad_norm=draw(st.sampled_from((0.0, 0.1))),
            exp_scale=draw(st.booleans()),
        ),
        offset=draw(st.integers(0, 5)),
    )
    problem = Problem(case, backend.device, draw(st.integers(0, 1000)))
    backend.run([problem])
    problem.check()


@on_every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(5, 17, 1, 1), (5, 17, 3), (5, 17, 3, 3), (5, 17, 5, 5), (5, 200, 3, 3), (3, 64, 1, 1)],
)
def test_what_is_not_finite_stays_in_its_filter(shape, layout, value, backend):
    problem = Problem(Case(shape, layout=layout), backend.device)
    clean = problem.expected()
    problem["grad"][2, 3].view(-1)[0] = value
    problem.remember()
    backend.run([problem])
    outputs = problem.outputs()
    assert not outputs["param"][2].isfinite().all()
    others = [number for number in range(shape[0]) if number != 2]
    for name, expected in clean.items():
        # As in `test_step`, but where the oracle itself is finite.
        actual = outputs[name][others].double()
        assert torch.allclose(actual, expected[others], rtol=1e-4, atol=1e-5)
    assert all(memory.is_intact() for memory in problem.memory.values())


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [Options(), Options(luma=10.0, exp_scale=False)])
def test_filters_of_norm_zero_have_no_anchor(options, dtype, backend):
    problem = Problem(Case((3, 17, 3, 3), dtype, options=options), backend.device)
    problem["param"][1] = 0
    if "log_scale" in problem.memory:
        problem["log_scale"][1] = 0
    problem.remember()
    backend.run([problem])
    problem.check()
    assert problem.outputs()["param"].isfinite().all()


@on_every_backend
def test_zero_gradients_and_no_rate_change_nothing(backend):
    problem = Problem(Case((3, 17, 3, 3), options=Options(lr=0.0)), backend.device)
    problem["grad"].zero_()
    problem.remember()
    backend.run([problem])
    # The reference forms V = W / exp(g) and multiplies again.
    assert torch.equal(problem.outputs()["param"], problem.inputs["param"]) or (
        backend is REFERENCE
    )
    assert torch.equal(problem.outputs()["log_scale"], problem.inputs["log_scale"])


def _bits(backend, cases):
    """Return everything that a step of the cases writes."""
    problems = [Problem(case, backend.device, seed) for seed, case in enumerate(cases)]
    backend.run(problems)
    return [tensor for problem in problems for tensor in problem.outputs().values()]


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# torch's own reductions, which the reference uses, split with the threads.
@on([backend for backend in NATIVE if backend is not REFERENCE])
def test_step_gives_the_same_bits_again_whatever_the_threads(backend):
    cases = [
        Case(shape, dtype, layout)
        for shape in ((40, 17, 3, 3), (3, 12_001), (40_003,), (2, 3_000, 5))
        for dtype in DTYPES
        for layout in (("contiguous", "channels_last") if len(shape) > 2 else ("contiguous",))
    ]
    threads = torch.get_num_threads()
    first = _bits(backend, cases)
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            assert _same(first, _bits(backend, cases))
    finally:
        torch.set_num_threads(threads)


@on((HOST, WHOLE_HOST, INTERPRETED))
def test_step_gives_the_same_bits_again(backend):
    shapes = ((2, 17, 3, 3), (1, 5001), (2, 2000, 5))
    cases = [Case(shape, dtype) for shape in shapes for dtype in DTYPES]
    assert _same(_bits(backend, cases), _bits(backend, cases))


def _scales(backend):
    if backend.is_simulated:
        # Some of them compile a kernel for each.
        return [(1024.0, 0.0), (3.0, 0.0)]
    return [(scale, found) for scale in (None, 1.0, 1024.0, 3.0) for found in (None, 0.0)]


@pytest.mark.parametrize(
    ("grad_scale", "found_inf", "backend"),
    [
        parameter(backend, *scales, name=f"{scales[0]}-{scales[1]}")
        for backend in available(BACKENDS)
        for scales in _scales(backend)
    ],
)
def test_gradients_are_divided_by_the_scale(grad_scale, found_inf, backend):
    kinds = ((3, 17, 3, 3), Options()), ((3, 17, 3, 3), Options(grad_norm=0.1)), ((40,), Options())
    problems = [
        Problem(Case(shape, dtype, options=options), backend.device)
        for shape, options in kinds
        for dtype in DTYPES
    ]
    scales = [
        None if value is None else torch.tensor(value, device=backend.device)
        for value in (grad_scale, found_inf)
    ]
    backend.run(problems, *scales)
    for problem in problems:
        problem.check(grad_scale or 1.0)


@on_every_backend
@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_nothing_changes_where_an_infinity_was_found(found_inf, backend):
    options, device = Options(dampening=0.3, grad_norm=0.1), backend.device
    problems = [
        Problem(Case((3, 17, 3, 3), options=options, first=first), device)
        for first in (False, True)
    ]
    scales = torch.tensor(2.0, device=device), torch.tensor(found_inf, device=device)
    arguments = step_arguments(problems, backend.backend, *scales)
    steps = [step.clone() for step in arguments[STEPS]]
    backend.step(arguments)
    for problem in problems:
        for name, value in problem.outputs().items():
            assert torch.equal(value, problem.inputs[name])
    assert torch.equal(torch.stack(arguments[STEPS]), torch.stack(steps))


@on_every_backend
def test_updates_are_counted(backend):
    case = Case((3, 17, 3, 3), options=Options(dampening=0.3), first=True)
    problem = Problem(case, backend.device)
    found_inf = torch.tensor(0.0, device=backend.device)
    arguments = step_arguments([problem], backend.backend, found_inf=found_inf)
    backend.step(arguments)
    backend.step(arguments)
    assert arguments[STEPS][0].item() == 2


@on_native_backends
def test_mutated_tensors_get_a_new_version(backend):
    problem = Problem(Case((3, 17, 3, 3)), backend.device)
    before = {name: problem[name]._version for name in problem.memory}
    backend.run([problem])
    for name in problem.memory:
        assert (problem[name]._version > before[name]) == (name != "grad")


@on_native_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_passes_opcheck(dtype, backend):
    problems = [
        Problem(Case((2, 3, 3, 3), dtype, options=Options(dampening=0.3)), backend.device),
        Problem(Case((5,), dtype), backend.device),
    ]
    for problem in problems:
        problem["param"].requires_grad_()
    arguments = step_arguments(problems, backend.backend)
    torch.library.opcheck(torch.ops.czm_fused.step_, arguments)


@on([backend for backend in NATIVE if backend.device == "cpu"])
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (GRADS, lambda x: [x[0][:1]], r"gradient of parameter 0 .*shape"),
        (GRADS, lambda x: [x[0].long()], r"gradient of parameter 0 is torch.int64"),
        (GRADS, lambda x: [x[0].to_sparse()], r"gradient of parameter 0 is torch.sparse_coo"),
        (MOMENTUM, lambda x: [x[0].double()], r"momentum_buffer of parameter 0 .*torch.float64"),
        (MOMENTUM, lambda x: [x[0][:1]], r"momentum_buffer of parameter 0"),
        (
            MOMENTUM,
            lambda x: [x[0].to(memory_format=torch.channels_last)],
            r"momentum_buffer of parameter 0 .*strides",
        ),
        (LOG_SCALES, lambda x: [x[0].double()], r"log_scale of parameter 0 .*torch.float64"),
        (LOG_SCALES, lambda x: [x[0][:1]], r"log_scale of parameter 0"),
        (LOG_SCALES, lambda x: [x[0].repeat(2)[::2]], r"log_scale of parameter 0 .*strides"),
        (LOG_SCALE_MOMENTUM, lambda x: [x[0].half()], r"log_scale_momentum_buffer of parameter 0"),
        (LOG_SCALE_MOMENTUM, lambda x: [], r"log_scale_momentum_buffers"),
        (STEPS, lambda x: [x[0].double()], r"step of parameter 0 .*torch.float64"),
        (REMAINDERS, lambda x: [torch.zeros(3, 4, 3, 3).short()], r"param_remainders"),
        (FLAGS, lambda x: x * 2, r"flags"),
        (GROUPS, lambda x: [7], r"group index 7"),
        (GROUPS, lambda x: [-1], r"group index -1"),
        (HYPER, lambda x: x[:, :5], r"hyperparameters .*9"),
    ],
)
def test_what_does_not_fit_is_refused(index, change, message, backend):
    problem = Problem(Case((3, 4, 3, 3), options=Options(dampening=0.3)))
    arguments = list(step_arguments([problem], backend.backend))
    arguments[index] = change(arguments[index])
    with pytest.raises((RuntimeError, ValueError), match=message):
        backend.step(arguments)
    for name, value in problem.outputs().items():
        assert torch.equal(value, problem.inputs[name])


@on((CPU,))
def test_gradient_of_another_dtype_is_refused_by_the_kernel(backend):
    problem = Problem(Case((3, 4, 3, 3)))
    arguments = list(step_arguments([problem], backend.backend))
    arguments[GRADS] = [arguments[GRADS][0].double()]
    with pytest.raises(RuntimeError, match="gradient of parameter 0 is torch.float64"):
        backend.step(arguments)
    assert torch.equal(problem.outputs()["param"], problem.inputs["param"])


@on((CPU,))
@pytest.mark.parametrize("options", [Options(), PLAIN])
def test_memory_with_gaps_is_refused_by_the_kernel(options, backend):
    problem = Problem(Case((3, 4, 3, 3), options=options))
    arguments = list(step_arguments([problem], backend.backend))
    arguments[PARAMS] = [torch.zeros(3, 4, 3, 6)[..., ::2]]
    for index in (MOMENTUM, LOG_SCALES, LOG_SCALE_MOMENTUM):
        arguments[index] = [torch.zeros_like(x) for x in arguments[index]]
    if arguments[MOMENTUM]:
        arguments[MOMENTUM] = [torch.zeros(3, 4, 3, 6)[..., ::2]]
    with pytest.raises(ValueError, match="must be .*has strides.*backend='reference'"):
        backend.step(arguments)


