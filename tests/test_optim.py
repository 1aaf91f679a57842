"""FusedCZMSGD as a `torch.optim.Optimizer`."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from czm_fused import FusedCZMSGD
from czm_fused.ops.step import reference
from small_training import (
    CZM,
    PLAIN,
    assert_equal,
    backward,
    network,
    on_every_backend,
    same_memory_order,
    train,
    weights,
)

# --- torch.optim.SGD ------------------------------------------------------------------------------


def sgd_options():
    for momentum, dampening, nesterov in (
        (0.0, 0.0, False),
        (0.0, 0.3, False),
        (0.9, 0.0, False),
        (0.9, 0.3, False),
        (0.9, 1.0, False),
        (0.9, 0.0, True),
    ):
        for weight_decay, maximize in itertools.product((0.0, 0.01), (False, True)):
            yield {
                "momentum": momentum,
                "dampening": dampening,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "maximize": maximize,
            }


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", list(sgd_options()), ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items() if v)
)
def test_step_is_sgd_where_the_method_is_off(options, dtype, backend):
    torch.manual_seed(0)
    # Sizes that leave a tail in vectors of every width.
    shapes = [(5, 3, 3, 3), (7, 17, 1, 1), (33,), (3, 5), (1,), (), (2, 3, 5), (1000,)]
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    fused = FusedCZMSGD(ours, lr=0.05, **options, **PLAIN, backend=backend)
    sgd = torch.optim.SGD(theirs, lr=0.05, **options, foreach=False)
    steps, eps = 20, torch.finfo(dtype).eps
    has_fma = torch.cpu._is_avx2_supported()
    for _ in range(steps):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fused.step()
        sgd.step()
        for a, b in zip(ours, theirs, strict=True):
            if backend == "cpu" and has_fma:
                # The kernel rounds exactly where torch's loops do, a fused multiply-add a term.
                assert torch.equal(a, b)
                if options["momentum"]:
                    buffer = sgd.state[b]["momentum_buffer"]
                    assert torch.equal(fused.state[a]["momentum_buffer"], buffer)
            else:
                # Without one, each of a step's 4 products rounds once more, by eps / 2 of numbers
                # that stay below 30: momentum sums gradients of size 3 to 10 times that.
                assert ((a - b).abs() <= 4 * steps * eps / 2 * 30).all()


@on_every_backend
def test_step_is_the_reference_where_the_method_is_on(backend):
    model = network(dtype=torch.float64)
    optimizer = FusedCZMSGD(
        model.parameters(), lr=0.1, momentum=0.9, luma=0.1, nesterov=True, backend=backend
    )
    params = [p.detach().clone() for p in model.parameters()]
    states = [
        (torch.zeros_like(p), reference.initial_log_scale(p), torch.zeros(len(p)).double())
        if p.dim() > 2 else (torch.zeros_like(p),)
        for p in params
    ]
    for seed in range(10):
        backward(model, seed)
        for p, q, state in zip(params, model.parameters(), states, strict=True):
            is_filter = p.dim() > 2
            reference.step_(
                p, q.grad, *state, lr=0.1, momentum=0.9, nesterov=True,
                zmg=0.85 * is_filter, luma=0.1 * is_filter,
            )
        optimizer.step()
    # 10 steps of some 100 roundings, of numbers near 1, in float64.
    for p, q in zip(params, model.parameters(), strict=True):
        assert ((p - q).abs() <= 10 * 100 * torch.finfo(torch.float64).eps).all()


@on_every_backend
def test_a_dampened_step_without_gradients_changes_nothing(backend):
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, dampening=0.5, backend=backend)
    train(model, optimizer, 1)
    before = weights(model)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(weights(model), before)


def test_a_dampened_step_of_the_dense_or_of_the_others_alone():
    # `auto` leaves the second, which has gaps in memory, to another backend.
    params = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2)[:, 0])
    optimizer = FusedCZMSGD(params, lr=1.0, momentum=0.5, dampening=0.25)
    for param in params:
        param.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
        assert_equal(param.detach(), torch.zeros(3))


def test_dampening_spares_the_first_step_of_each_parameter():
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = FusedCZMSGD([a, b], lr=1.0, momentum=0.5, dampening=0.25)
    a.grad = torch.ones(3)
    optimizer.step()
    b.grad = torch.ones(3)
    optimizer.step()
    assert_equal(optimizer.state[a]["momentum_buffer"], torch.full((3,), 0.5 + 0.75))
    assert_equal(optimizer.state[b]["momentum_buffer"], torch.ones(3))


# --- groups, arguments, schedulers ----------------------------------------------------------------


def test_groups_keep_their_own_hyper_parameters():
    model, twin = network(), network()
    convs = [p for p in model.parameters() if p.dim() > 2]
    rest = [p for p in model.parameters() if p.dim() <= 2]
    optimizer = FusedCZMSGD([{"params": convs}], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": rest, "lr": 0.01, **PLAIN})
    train(model, optimizer, 3)
    filters = FusedCZMSGD([p for p in twin.parameters() if p.dim() > 2], lr=0.1, momentum=0.9)
    others = FusedCZMSGD([p for p in twin.parameters() if p.dim() <= 2], lr=0.01, momentum=0.9)
    for seed in range(3):
        backward(twin, seed)
        filters.step()
        others.step()
    assert_equal(weights(model), weights(twin))


def test_a_group_added_between_steps_is_trained():
    model = network()
    first, *others = model.parameters()
    optimizer = FusedCZMSGD([first], **CZM)
    train(model, optimizer, 2)
    before = others[0].detach().clone()
    optimizer.add_param_group({"params": others})
    train(model, optimizer, 1)
    assert not torch.equal(before, others[0])


def test_rows_are_filters_only_where_the_group_says_so():
    linear = nn.Linear(4, 3)
    for options, is_filter in (({}, False), ({"luma": 0.1}, True), ({"exp_scale": True}, True)):
        optimizer = FusedCZMSGD([{"params": linear.parameters(), **options}], **CZM)
        linear(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        assert ("log_scale" in optimizer.state[linear.weight]) == is_filter
        assert "log_scale" not in optimizer.state[linear.bias]


def test_named_parameters_keep_their_names():
    model = network()
    optimizer = FusedCZMSGD(model.named_parameters(), **CZM)
    names = [name for name, _ in model.named_parameters()]
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["param_names"] == names
    other = FusedCZMSGD(network().named_parameters(), **CZM)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == names


def test_step_returns_the_closures_loss():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)

    def closure():
        assert torch.is_grad_enabled()
        return backward(model, 0)

    before = weights(model)
    assert optimizer.step(closure).item() == backward(network(), 0).item()
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_may_be_a_tensor(dtype):
    lr = torch.tensor(0.25, dtype=dtype)
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), lr=lr, momentum=0.9)
    by_float = FusedCZMSGD(twin.parameters(), lr=0.25, momentum=0.9)
    train(model, optimizer, 2)
    train(twin, by_float, 2)
    optimizer.param_groups[0]["lr"].fill_(0.125)
    by_float.param_groups[0]["lr"] = 0.125
    train(model, optimizer, 2, begin=2)
    train(twin, by_float, 2, begin=2)
    assert_equal(weights(model), weights(twin))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_act_as_on_sgd(name, tensor_lr):
    model, twin = network(), network()
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    ours = FusedCZMSGD(model.parameters(), lr=lr, momentum=0.9, **PLAIN, backend="reference")
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, foreach=False)
    schedules = [SCHEDULERS[name](optimizer) for optimizer in (ours, theirs)]
    for seed in range(6):
        for net, optimizer, schedule in zip(
            (model, twin), (ours, theirs), schedules, strict=True
        ):
            backward(net, seed)
            optimizer.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        for key in ("lr", "momentum"):
            value = float(ours.param_groups[0][key])
            assert value == pytest.approx(theirs.param_groups[0][key], rel=1e-12)
    # As far apart as 6 steps' roundings of weights and gradients below 1 can bring them.
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert ((a - b).abs() <= 6 * 20 * torch.finfo(torch.float32).eps).all()


def test_hyper_parameters_edited_between_steps_act():
    model, twin = network(), network()
    ours = FusedCZMSGD(model.parameters(), lr=0.1, **PLAIN, backend="reference")
    for edit in (
        {"zmg": 0.85}, {"luma": 0.5}, {"grad_norm": 0.1}, {"momentum": 0.9}, {"exp_scale": True},
        {"lr": 0.01}, {"nesterov": True}, {"nesterov": False, "dampening": 0.5}, {"momentum": 0.0},
        {"exp_scale": False, "luma": 0.0}, {"momentum": 0.5, "zmg": 0.0}, {"maximize": True},
    ):
        ours.param_groups[0].update(edit)
        # A fresh optimizer with the same state makes its plan anew.
        theirs = FusedCZMSGD(twin.parameters(), lr=0.1, backend="reference")
        twin.load_state_dict(model.state_dict())
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        train(model, ours, 2)
        train(twin, theirs, 2)
        assert_equal(weights(model), weights(twin))


# --- parameters and gradients that come, go and change --------------------------------------------


def test_parameters_without_a_gradient_are_left_alone():
    model = network()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = FusedCZMSGD(model.parameters(), weight_decay=0.1, **CZM)
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, frozen)


def test_no_gradients_at_all():
    optimizer = FusedCZMSGD(network().parameters(), **CZM)
    optimizer.step()
    assert not optimizer.state


def test_gradients_may_lie_in_memory_as_they_like():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    grad = torch.randn(4, 3, 3, 3)
    results = []
    for g in (
        grad,
        grad.to(memory_format=torch.channels_last),
        grad.repeat_interleave(2, dim=3)[..., ::2],
        grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        param = nn.Parameter(weight.clone())
        param.grad = g
        FusedCZMSGD([param], **CZM).step()
        results.append(param.detach())
    for result in results[1:]:
        assert_equal(result, results[0])


def test_an_expanded_gradient():
    param = nn.Parameter(torch.ones(4, 3, 3, 3))
    param.sum().backward()
    assert param.grad.stride() == (0, 0, 0, 0) or param.grad.is_contiguous()
    param.grad = torch.ones(()).expand(4, 3, 3, 3)
    FusedCZMSGD([param], lr=0.5, **PLAIN).step()
    assert_equal(param.detach(), torch.full((4, 3, 3, 3), 0.5))


def convert_half(model):
    return model.to(torch.bfloat16)


def convert_channels_last(model):
    return model.to(memory_format=torch.channels_last)


def convert_double(model):
    return model.double()


def replace_data(model):
    for p in model.parameters():
        p.data = p.data.clone()
    return model


@on_every_backend
@pytest.mark.parametrize(
    "convert", [convert_half, convert_channels_last, convert_double, replace_data]
)
@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}])
def test_a_converted_model_continues(convert, options, backend):
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, **options, backend=backend)
    other = FusedCZMSGD(twin.parameters(), **CZM, **options, backend=backend)
    train(model, optimizer, 3)
    train(twin, other, 3)
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    convert(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = torch.randn(q.shape).to(p.dtype).to(q.dtype)
        p.grad = q.grad.to(p.dtype).to(memory_format=torch.preserve_format)
    optimizer.step()
    # Rounding the weights to bfloat16 is what the conversion does, so does the twin.
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if convert is convert_half else {}
    other.step()
    for p, q, m in zip(model.parameters(), twin.parameters(), momentum, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == p.dtype and same_memory_order(buffer, p)
        torch.testing.assert_close(p.to(q.dtype), q, **tolerance)
        torch.testing.assert_close(
            buffer.to(m.dtype), other.state[q]["momentum_buffer"], **tolerance
        )
        if p.dim() > 2:
            assert optimizer.state[p]["log_scale"].dtype == reference.compute_dtype(p.dtype)


@on_every_backend
def test_edited_state_is_noticed(backend):
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, backend=backend)
    train(model, optimizer, 2)
    weight = model[0].weight
    backward(model, 5)

    optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, 100.0)
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].min() > 80

    # As the well-known loop does that moves an optimizer's state to another device.
    for values in optimizer.state.values():
        for value in values.values():
            value.data = value.data.clone() * 0 - 7
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].max() < -5

    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].abs().max() < 5

    before = weights(model)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"momentum_buffer must have shape .*has \(3,\)"):
        optimizer.step()
    assert_equal(weights(model), before)


def test_step_bumps_versions():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    backward(model, 0)
    before = [p._version for p in model.parameters()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))
    # What autograd saved of the old weights is refused.
    x = torch.ones(1, 3, 6, 6, requires_grad=True)
    loss = model(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_parameters():
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((0,), (0, 3, 3, 3), (4, 0, 3, 3))]
    params.append(nn.Parameter(torch.ones(2, 3, 3, 3)))
    optimizer = FusedCZMSGD(params, **CZM)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not torch.equal(params[-1], torch.ones(2, 3, 3, 3))


def test_zero_grad_and_hooks():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, 1)
    assert calls == ["pre", "post"]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# --- memory ---------------------------------------------------------------------------------------


def test_state_is_two_numbers_a_filter_beyond_momentum():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    train(model, optimizer, 2)
    filters = sum(p.shape[0] for p in model.parameters() if p.dim() > 2)
    momentum = sum(p.nbytes for p in model.parameters())
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values())
    assert state == momentum + filters * 2 * 4
