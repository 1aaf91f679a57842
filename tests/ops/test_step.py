"""czm_fused::step_ on every backend against the oracle: one matrix, the backend a parameter."""

import math
import random

import pytest
import torch
from helpers.cases import (
    AVAILABLE,
    BACKENDS,
    DTYPES,
    LAYOUTS,
    OPTION_CASES,
    OTHER_CASES,
    PLAIN,
    SHAPE_CASES,
    Case,
    Options,
    Problem,
    run,
    step_arguments,
    unavailable,
)
from hypothesis import given, settings
from hypothesis import strategies as st

on_every_backend = pytest.mark.parametrize(
    ("backend", "device"), AVAILABLE, ids=["-on-".join(pair) for pair in AVAILABLE]
)


@pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=["-on-".join(b) for b in BACKENDS])
def test_backend_is_tested_here(backend, device):
    """The matrix collects what can run; this one says why the rest is not in it."""
    reason = unavailable(backend, device)
    if reason is not None:
        pytest.skip(reason)


def _cases(backend):
    # The reference has no loops of its own that shapes could break.
    return OPTION_CASES + OTHER_CASES + (SHAPE_CASES if backend != "reference" else [])


@pytest.mark.parametrize(
    ("case", "backend", "device"),
    [
        pytest.param(case, backend, device, id=f"{case}-{backend}-on-{device}")
        for backend, device in AVAILABLE
        for case in _cases(backend)
    ],
)
def test_step(case, backend, device):
    problem = Problem(case, device)
    run([problem], backend)
    problem.check()


@on_every_backend
def test_step_of_many_groups_and_dtypes_in_one_call(backend, device):
    cases = random.Random(0).sample(OPTION_CASES, 20)
    cases += [
        Case(shape, dtype, layout, options=options)
        for shape, layout in (((3, 17, 3, 3), "channels_last"), ((40_001,), "contiguous"))
        for dtype in DTYPES
        for options in (Options(lr=0.3), PLAIN)
    ]
    cases += [Case((0,)), Case((0, 3, 3, 3)), Case((4, 2), options=Options(luma=0.3))]
    random.Random(1).shuffle(cases)
    problems = [Problem(case, device, seed) for seed, case in enumerate(cases)]
    run(problems, backend)
    for problem in problems:
        problem.check()


@on_every_backend
def test_step_of_no_tensors(backend, device):
    torch.ops.czm_fused.step_(
        [], [], [], [], [], [], [], [], [], torch.zeros(1, 8, dtype=torch.float64), backend
    )


@on_every_backend
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_step_of_any_shape(backend, device, data):
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
            exp_scale=draw(st.booleans()),
        ),
        offset=draw(st.integers(0, 5)),
    )
    problem = Problem(case, device, draw(st.integers(0, 1000)))
    run([problem], backend)
    problem.check()


@on_every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3,), (3, 3), (5, 5)])
def test_what_is_not_finite_stays_in_its_filter(kernel, layout, value, backend, device):
    case = Case((5, 17, *kernel), layout=layout)
    problem = Problem(case, device)
    clean = problem.expected()
    problem["grad"][2, 3].view(-1)[0] = value
    problem.remember()
    run([problem], backend)
    outputs = problem.outputs()
    assert not outputs["param"][2].isfinite().all()
    for name, expected in clean.items():
        others = [0, 1, 3, 4]
        # As in `test_step`, but where the oracle itself is finite.
        actual = outputs[name][others].double()
        assert torch.allclose(actual, expected[others], rtol=1e-4, atol=1e-5)
    assert all(memory.is_intact() for memory in problem.memory.values())


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [Options(), Options(luma=10.0, exp_scale=False)])
def test_filters_of_norm_zero_have_no_anchor(options, dtype, backend, device):
    problem = Problem(Case((3, 17, 3, 3), dtype, options=options), device)
    problem["param"][1] = 0
    if "log_scale" in problem.memory:
        problem["log_scale"][1] = 0
    problem.remember()
    run([problem], backend)
    problem.check()
    assert problem.outputs()["param"].isfinite().all()


@on_every_backend
def test_zero_gradients_and_no_rate_change_nothing(backend, device):
    problem = Problem(Case((3, 17, 3, 3), options=Options(lr=0.0)), device)
    problem["grad"].zero_()
    problem.remember()
    run([problem], backend)
    # The reference forms V = W / exp(g) and multiplies again.
    assert torch.equal(problem.outputs()["param"], problem.inputs["param"]) or (
        backend == "reference"
    )
    assert torch.equal(problem.outputs()["log_scale"], problem.inputs["log_scale"])


@pytest.mark.parametrize(
    ("backend", "device"),
    # torch's own reductions, which the reference uses, split with the threads.
    [pair for pair in AVAILABLE if pair[0] != "reference"],
)
def test_step_gives_the_same_bits_again_whatever_the_threads(backend, device):
    cases = [
        Case(shape, dtype, layout)
        for shape in ((40, 17, 3, 3), (3, 12_001), (40_003,), (2, 3_000, 5))
        for dtype in DTYPES
        for layout in (("contiguous", "channels_last") if len(shape) > 2 else ("contiguous",))
    ]

    def outputs():
        problems = [Problem(case, device, seed) for seed, case in enumerate(cases)]
        run(problems, backend)
        return [tensor for problem in problems for tensor in problem.outputs().values()]

    threads = torch.get_num_threads()
    first = outputs()
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            for a, b in zip(first, outputs(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@on_every_backend
@pytest.mark.parametrize("found_inf", [None, 0.0])
@pytest.mark.parametrize("grad_scale", [None, 1.0, 1024.0, 3.0])
def test_gradients_are_divided_by_the_scale(grad_scale, found_inf, backend, device):
    problems = [
        Problem(Case(shape, dtype), device) for shape in ((3, 17, 3, 3), (40,)) for dtype in DTYPES
    ]
    run(
        problems,
        backend,
        None if grad_scale is None else torch.tensor(grad_scale, device=device),
        None if found_inf is None else torch.tensor(found_inf, device=device),
    )
    for problem in problems:
        problem.check(grad_scale or 1.0)


@on_every_backend
@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_nothing_changes_where_an_infinity_was_found(found_inf, backend, device):
    options = Options(dampening=0.3)
    problems = [Problem(Case((3, 17, 3, 3), options=options, first=first), device) for first in
                (False, True)]
    arguments = step_arguments(
        problems, backend, torch.tensor(2.0, device=device), torch.tensor(found_inf, device=device)
    )
    steps = [step.clone() for step in arguments[5]]
    torch.ops.czm_fused.step_(*arguments)
    for problem in problems:
        for name, value in problem.outputs().items():
            assert torch.equal(value, problem.inputs[name])
    assert torch.equal(torch.stack(arguments[5]), torch.stack(steps))


@on_every_backend
def test_updates_are_counted(backend, device):
    problem = Problem(Case((3, 17, 3, 3), options=Options(dampening=0.3), first=True), device)
    arguments = step_arguments([problem], backend, found_inf=torch.tensor(0.0, device=device))
    torch.ops.czm_fused.step_(*arguments)
    torch.ops.czm_fused.step_(*arguments)
    assert arguments[5][0].item() == 2


@on_every_backend
def test_mutated_tensors_get_a_new_version(backend, device):
    problem = Problem(Case((3, 17, 3, 3)), device)
    before = {name: problem[name]._version for name in problem.memory}
    run([problem], backend)
    for name in problem.memory:
        assert (problem[name]._version > before[name]) == (name != "grad")


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_passes_opcheck(dtype, backend, device):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes minutes for opcheck's repetitions")
    problems = [
        Problem(Case((2, 3, 3, 3), dtype, options=Options(dampening=0.3)), device),
        Problem(Case((5,), dtype), device),
    ]
    for problem in problems:
        problem["param"].requires_grad_()
    torch.library.opcheck(torch.ops.czm_fused.step_, step_arguments(problems, backend))


PARAMS, GRADS, MOMENTUM, LOG_SCALES, LOG_SCALE_MOMENTUM, STEPS = range(6)
REMAINDERS, FLAGS, GROUPS, HYPER = range(6, 10)


@pytest.mark.parametrize("backend", [backend for backend, device in AVAILABLE if device == "cpu"])
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (GRADS, lambda x: [x[0][:1]], r"gradient of parameter 0 .*shape"),
        (GRADS, lambda x: [x[0].double()], r"gradient of parameter 0 is torch.float64"),
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
        (HYPER, lambda x: x[:, :5], r"hyperparameters .*8"),
    ],
)
def test_what_does_not_fit_is_refused(index, change, message, backend):
    problem = Problem(Case((3, 4, 3, 3), options=Options(dampening=0.3)))
    arguments = list(step_arguments([problem], backend))
    arguments[index] = change(arguments[index])
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.czm_fused.step_(*arguments)
    for name, value in problem.outputs().items():
        assert torch.equal(value, problem.inputs[name])


@pytest.mark.skipif(("cpu", "cpu") not in AVAILABLE, reason="the native cpu module is not built")
@pytest.mark.parametrize("options", [Options(), PLAIN])
def test_memory_with_gaps_is_refused_by_the_kernel(options):
    problem = Problem(Case((3, 4, 3, 3), options=options))
    arguments = list(step_arguments([problem], "cpu"))
    arguments[PARAMS] = [torch.zeros(3, 4, 3, 6)[..., ::2]]
    for index in (MOMENTUM, LOG_SCALES, LOG_SCALE_MOMENTUM):
        arguments[index] = [torch.zeros_like(x) for x in arguments[index]]
    if arguments[MOMENTUM]:
        arguments[MOMENTUM] = [torch.zeros(3, 4, 3, 6)[..., ::2]]
    with pytest.raises(ValueError, match="must be .*has strides.*backend='reference'"):
        torch.ops.czm_fused.step_(*arguments)


