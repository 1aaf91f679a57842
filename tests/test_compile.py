"""torch.compile: the optimizer's step, and networks of the package's layers."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

from czm_fused import CZMConv2d, FusedCZMSGD, exp_scale
from czm_fused.nn import CZMBasicBlock
from small_training import assert_equal, backward, network, state_of, train, weights

needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor finds no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # A pool of processes costs more than it saves here.
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


# --- the step -------------------------------------------------------------------------------------


def groups_of(model, lr):
    """Return two groups, each with a rate of its own: `lr`, and half of it."""
    filters = [p for p in model.parameters() if p.dim() > 2]
    rest = [p for p in model.parameters() if p.dim() <= 2]
    return [{"params": filters, "lr": lr}, {"params": rest, "lr": lr / 2}]


@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=needs_a_compiler)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"dampening": 0.5, "weight_decay": 0.1, "grad_norm": 0.1}, {"capturable": True}],
    ids=["plain", "dampening", "capturable"],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_step_compiles_once_under_a_scheduler(options, compiler):
    if compiler == "inductor" and options:
        pytest.skip("Inductor is tried once")
    model, twin = network(), network()
    # Halved exactly: a rate kept in float32 is that of the twin.
    lr = 0.125 if "capturable" in options else torch.tensor(0.125)
    optimizer = FusedCZMSGD(groups_of(model, lr), momentum=0.9, **options)
    plain = FusedCZMSGD(groups_of(twin, 0.125), momentum=0.9, **{**options, "capturable": False})
    # The first step creates state, and is no part of what recurs.
    train(model, optimizer, 1)
    train(twin, plain, 1)
    # Before the scheduler: it wraps `step` in a function that Dynamo refuses to trace.
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    schedules = [lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, plain)]
    rates = [group["lr"] for group in optimizer.param_groups]
    for seed in range(1, 6):
        backward(model, seed)
        compiled()
        backward(twin, seed)
        plain.step()
        for schedule in schedules:
            schedule.step()
        assert_equal(weights(model), weights(twin))
        assert_equal(state_of(optimizer), state_of(plain))
    assert counter.frame_count == 1
    assert [rate.item() for rate in rates] == [0.125 / 2**5, 0.0625 / 2**5]


def test_compiled_step_creates_missing_state():
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    plain = FusedCZMSGD(twin.parameters(), lr=float(torch.tensor(0.1)), momentum=0.9)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        backward(model, seed)
        compiled()
        backward(twin, seed)
        plain.step()
    assert_equal(weights(model), weights(twin))


def test_compiled_step_after_eager_steps_and_back():
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), lr=torch.tensor(0.125), momentum=0.9)
    plain = FusedCZMSGD(twin.parameters(), lr=0.125, momentum=0.9)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for seed, step in enumerate((optimizer.step, compiled, optimizer.step, compiled)):
        backward(model, seed)
        step()
        backward(twin, seed)
        plain.step()
    assert_equal(weights(model), weights(twin))


@pytest.mark.parametrize(
    ("convert", "resets"),
    [
        (lambda model: model.to(memory_format=torch.channels_last), False),
        (nn.Module.double, True),
        (nn.Module.bfloat16, False),
    ],
    ids=["channels_last, eager step", "double, reset", "bfloat16, eager step"],
)
def test_compiled_step_of_a_converted_model_names_the_remedy(convert, resets):
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), lr=torch.tensor(0.125), momentum=0.9)
    plain = FusedCZMSGD(twin.parameters(), lr=0.125, momentum=0.9)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    backward(model, 0), backward(twin, 0)
    compiled(), plain.step()
    convert(model), convert(twin)
    for seed in (1, 2):
        backward(model, seed), backward(twin, seed)
        plain.step()
        if seed == 1:
            before = weights(model)
            with pytest.raises(ValueError, match="converted .* without torch.compile, .*reset()"):
                compiled()
            assert_equal(weights(model), before)
            if not resets:
                optimizer.step()
                continue
            torch.compiler.reset()
        compiled()
    assert_equal(weights(model), weights(twin))
    assert_equal(state_of(optimizer), state_of(plain))


def test_compiled_step_refuses_a_remainder_of_whole_weights():
    model = network(dtype=torch.bfloat16)
    optimizer = FusedCZMSGD(model.parameters(), lr=torch.tensor(0.125), master_weights=True)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    backward(model, 0)
    compiled()
    backward(model.float(), 1)
    with pytest.raises(ValueError, match="parameter 0 must be of 2 bytes .* converted"):
        compiled()
    for step in (optimizer.step, compiled):
        step()


def test_compiled_step_of_parameters_with_gaps():
    whole = torch.randn(4, 3, 3, 3, 2)
    params = [nn.Parameter(x[..., 0]) for x in (whole.clone(), whole.clone())]
    optimizers = [FusedCZMSGD([p], lr=torch.tensor(0.125), momentum=0.9) for p in params]
    steps = [
        torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager"),
        optimizers[1].step,
    ]
    for _ in range(2):
        params[0].grad = torch.randn(4, 3, 3, 3)
        params[1].grad = params[0].grad.clone()
        for step in steps:
            step()
    assert not params[0].is_contiguous()
    assert_equal(*(p.detach() for p in params))


@needs_a_compiler
def test_compiled_step_without_size_asserts_follows_every_layout():
    params = [nn.Parameter(torch.ones(4, 3, 3, 3)) for _ in range(2)]
    optimizers = [FusedCZMSGD([p], lr=torch.tensor(0.001), momentum=0.9) for p in params]
    steps = [
        torch.compile(optimizers[0].step, fullgraph=True, options={"size_asserts": False}),
        optimizers[1].step,
    ]
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        grad = torch.randn(4, 3, 3, 3)
        params[0].grad = grad.contiguous(memory_format=layout)
        params[1].grad = grad
        for step in steps:
            step()
        assert_equal(*(p.detach() for p in params))


# --- networks -------------------------------------------------------------------------------------


@needs_a_compiler
def test_inductor_agrees_with_eager_on_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        CZMConv2d(3, 4, 3, stem=True),
        CZMBasicBlock(4, 8, stride=2, amplitude=0.1),
        exp_scale(nn.Conv2d(8, 5, 3)),
        nn.Flatten(),
        nn.LazyLinear(2),
    ).double()
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    model(x)
    twin = copy.deepcopy(model)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(model, fullgraph=True)
        torch.manual_seed(1)
        actual = compiled(x)
        actual.square().sum().backward()
    torch.manual_seed(1)
    expected = twin(x)
    expected.square().sum().backward()
    # Sums of some 100 numbers of size 1, over four layers and back, in another order.
    close = {"rtol": 0, "atol": 8 * 100 * 10 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(actual, expected, **close)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **close)
    model.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x), **close)
