"""Mixed precision, and weights of low precision: autocast, and float32 weights behind half ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from czm_fused import FusedCZMSGD
from czm_fused.ops.step import reference
from small_training import (
    CZM,
    assert_equal,
    backward,
    network,
    on_every_backend,
    same_memory_order,
    state_of,
    train,
)

HALVES = (torch.bfloat16, torch.float16)


@on_every_backend
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_with_a_scaler(dtype, clip, fused, backend):
    """Scaled steps under autocast are the unscaled ones, whichever steps are skipped."""
    model, twin = network(), network()
    optimizer, plain = (
        FusedCZMSGD(m.parameters(), **CZM, backend=backend, fused=fused) for m in (model, twin)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed, infinite in enumerate((True, False, True, False, False)):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        for each, scale in ((model, scaler.scale), (twin, lambda loss: loss)):
            each.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                output = each(x)
            loss = output.float().square().mean()
            scale(loss * float("inf") if infinite and each is model else loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            for each in (model, twin):
                clip_grad_norm_(each.parameters(), clip)
        before = copy.deepcopy(model.state_dict()), state_of(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            assert_equal(model.state_dict(), before[0])
            # But for state that the first step makes, of zeros and of the weights' own scales.
            assert not before[1][0] or state_of(optimizer)[0].keys() == before[1][0].keys()
        else:
            plain.step()
        # Gradients in half precision are rounded at another scale, of normal numbers: by a power
        # of two, which changes no bit, unless they are subnormal in float16.
        tolerance = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), **tolerance)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def exact_weights(model, optimizer):
    return [
        reference.exact_param(p.detach(), optimizer.state[p]["param_remainder"])
        for p in model.parameters()
    ]


@on_every_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", HALVES)
def test_master_weights_are_those_of_a_float32_training(dtype, layout, backend):
    model = network(dtype=dtype).to(memory_format=layout)
    # The same training by hand: the optimizer steps float32 weights, the network computes in half.
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    options = {**CZM, "momentum": 0.0, "lr": 1e-3}
    optimizer = FusedCZMSGD(model.parameters(), **options, master_weights=True, backend=backend)
    by_hand = FusedCZMSGD(masters, **options, backend=backend)
    for seed in range(20):
        backward(model, seed)
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.to(master.dtype)
        optimizer.step()
        by_hand.step()
        for p, master, exact in zip(
            model.parameters(), masters, exact_weights(model, optimizer), strict=True
        ):
            # One unit in the last place where a rounding was a tie, and what float16 cannot say
            # of weights below 2^-17.
            torch.testing.assert_close(exact, master.detach(), rtol=2**-22, atol=2**-24)
            assert torch.equal(p, exact.to(dtype))
            assert same_memory_order(optimizer.state[p]["param_remainder"], p)


@on_every_backend
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"zmg": 0.0, "luma": 0.0, "exp_scale": False}], ids=str)
def test_steps_too_small_to_be_seen_add_up(options, dtype, backend):
    weight = nn.Parameter(torch.full((2, 3, 3, 3), 1.0, dtype=dtype))
    stalled = nn.Parameter(weight.detach().clone())
    mask = torch.zeros(2, 3, 3, 3, dtype=dtype)
    mask[0, 0, 0, 0], mask[0, 0, 0, 1] = 1, -1
    # The rate of an exp-scaled filter is that of V times its squared scale, here its squared norm.
    lr = 1e-4 / 27 if options == {} else 1e-4
    for p, master_weights in ((weight, True), (stalled, False)):
        optimizer = FusedCZMSGD(
            [p], lr=lr, **options, master_weights=master_weights, backend=backend
        )
        for _ in range(200):
            p.grad = mask
            optimizer.step()
    # Half a unit in the last place below 1 is 2.4e-4 in float16, and 2e-3 in bfloat16.
    assert torch.equal(stalled, torch.ones_like(stalled))
    moved = 1 - weight[0, 0, 0, 0].item()
    assert abs(moved - 200 * 1e-4) < 0.1 * 200 * 1e-4


@on_every_backend
@pytest.mark.parametrize("dtype", HALVES)
def test_master_weights_go_on_from_a_file(dtype, backend, tmp_path):
    model = network(dtype=dtype)
    options = {**CZM, "master_weights": True, "backend": backend}
    optimizer = FusedCZMSGD(model.parameters(), **options)
    train(model, optimizer, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    twin = network(seed=1, dtype=dtype).to(memory_format=torch.channels_last)
    twin.load_state_dict(weights)
    other = FusedCZMSGD(twin.parameters(), lr=7.0, backend=backend)
    other.load_state_dict(state)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        remainder = other.state[q]["param_remainder"]
        assert remainder.dtype == torch.int16 and same_memory_order(remainder, q)
        assert torch.equal(remainder, optimizer.state[p]["param_remainder"])
    twin.to(memory_format=torch.contiguous_format)
    train(model, optimizer, 3, begin=3)
    train(twin, other, 3, begin=3)
    assert_equal(exact_weights(twin, other), exact_weights(model, optimizer))


def test_master_weights_switched_twice_are_of_the_present_weights():
    model = nn.Conv2d(3, 4, 3).bfloat16()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, master_weights=True)
    for master_weights in (True, False, True, False, True):
        optimizer.param_groups[0]["master_weights"] = master_weights
        # The bias has no gradient in the first step, for which the plan is made.
        for parameters in ([model.weight], [model.weight, model.bias]):
            optimizer.zero_grad()
            for param in parameters:
                param.grad = torch.randn_like(param)
            optimizer.step()
        for param in model.parameters():
            assert ("param_remainder" in optimizer.state[param]) == master_weights


def test_master_weights_cost_two_bytes_and_only_where_they_help():
    for dtype, extra in ((torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 0)):
        model = network(dtype=dtype)
        plain, optimizer = (
            FusedCZMSGD(model.parameters(), **CZM, master_weights=flag) for flag in (False, True)
        )
        train(model, plain, 1)
        train(model, optimizer, 1)
        weights = sum(p.numel() for p in model.parameters())
        sizes = [
            sum(value.nbytes for state in state_of(each) for value in state.values())
            for each in (plain, optimizer)
        ]
        assert sizes[1] - sizes[0] == extra * weights


def test_a_state_with_remainders_loads_under_another_dtype():
    model = network(dtype=torch.bfloat16)
    optimizer = FusedCZMSGD(model.parameters(), **CZM, master_weights=True)
    train(model, optimizer, 3)
    for dtype in (torch.float32, torch.float16):
        twin = network(dtype=dtype)
        twin.load_state_dict(model.state_dict())
        other = FusedCZMSGD(twin.parameters(), **CZM)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if dtype == torch.float16:
            # The remainder is a distance between float32 numbers, and bfloat16's fit into float16.
            before = exact_weights(model, optimizer)
            for p, weight in zip(twin.parameters(), before, strict=True):
                exact = reference.exact_param(p.detach(), other.state[p]["param_remainder"])
                torch.testing.assert_close(exact, weight, rtol=0, atol=2**-24)
        train(twin, other, 1, begin=3)
        assert all(p.isfinite().all() for p in twin.parameters())


@on_every_backend
def test_the_option_is_a_groups_and_may_change(backend):
    model = network(dtype=torch.bfloat16)
    groups = [
        {"params": model[0].parameters(), "master_weights": True},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = FusedCZMSGD(groups, **CZM, backend=backend)
    train(model, optimizer, 2)
    present = ["param_remainder" in optimizer.state[p] for p in model.parameters()]
    assert present == [True, True, False, False, False, False]
    optimizer.param_groups[1]["master_weights"] = True
    train(model, optimizer, 2, begin=2)
    assert all("param_remainder" in optimizer.state[p] for p in model.parameters())


def test_a_compiled_step_keeps_master_weights():
    torch._dynamo.reset()
    model, twin = network(dtype=torch.bfloat16), network(dtype=torch.bfloat16)
    optimizer, plain = (
        FusedCZMSGD(m.parameters(), lr=torch.tensor(1e-3), momentum=0.9, master_weights=True)
        for m in (model, twin)
    )
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        backward(model, seed)
        compiled()
        backward(twin, seed)
        plain.step()
    assert_equal(exact_weights(model, optimizer), exact_weights(twin, plain))


@on_every_backend
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_set_to_zero_from_outside_stay_numbers(dtype, backend):
    """A zero's bits have none below them that a negative remainder could take."""
    model = network().to(dtype)
    optimizer = FusedCZMSGD(model.parameters(), **CZM, master_weights=True, backend=backend)
    for seed in range(3):
        train_step(model, optimizer, seed)
    with torch.no_grad():
        for param in model.parameters():
            assert (optimizer.state[param]["param_remainder"] < 0).any()
            param.view(-1)[: 1 + param.numel() // 2] = 0
    train_step(model, optimizer, 3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_remainders_go_with_the_option():
    """They would be of other weights when it is turned on again."""
    model = network().to(torch.bfloat16)
    optimizer = FusedCZMSGD(model.parameters(), **CZM, master_weights=True)
    train_step(model, optimizer, 0)
    optimizer.param_groups[0]["master_weights"] = False
    train_step(model, optimizer, 1)
    assert not any("param_remainder" in state for state in optimizer.state.values())


def train_step(model, optimizer, seed):
    backward(model, seed)
    optimizer.step()


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_step_leaves_gradients_as_torch_does(transposed, overflows):
    grads = []
    for make in (FusedCZMSGD, torch.optim.SGD):
        param = torch.nn.Parameter(torch.ones(3, 4))
        grad = torch.arange(12.0).view(3, 4)
        param.grad = grad.t().contiguous().t() if transposed else grad.clone()
        optimizer = make([param], lr=0.1, momentum=0.9, fused=True)
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(float(overflows))
        optimizer.step()
        grads.append(param.grad)
    assert torch.equal(*grads)
    assert torch.equal(grads[0], torch.arange(12.0).view(3, 4) / (1.0 if overflows else 4.0))
