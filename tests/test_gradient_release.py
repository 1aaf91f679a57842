"""GradientRelease: the step within backward, against the step after it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from czm_fused import FusedCZMSGD
from czm_fused.gradient_release import GradientRelease
from small_training import (
    BACKENDS,
    CZM,
    PLAIN,
    assert_equal,
    backward,
    network,
    on_every_backend,
    state_of,
    train,
    weights,
)


def released(model, optimizer, steps, begin=0):
    """Train with steps that find no gradient after backward."""
    model.zero_grad()
    release = GradientRelease(optimizer)
    for seed in range(begin, begin + steps):
        backward(model, seed)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    release.remove()


@on_every_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"dampening": 0.5, "luma": 0.1},
        {"grad_norm": 0.1},
        {"momentum": 0.0},
        PLAIN,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_backward_are_the_steps_after_it(dtype, options, backend):
    model, twin = network(dtype=dtype), network(dtype=dtype)
    optimizer = FusedCZMSGD(model.parameters(), **{**CZM, **options}, backend=backend)
    plain = FusedCZMSGD(twin.parameters(), **{**CZM, **options}, backend=backend)
    released(model, optimizer, 4)
    train(twin, plain, 4)
    assert_equal(weights(model), weights(twin))
    assert_equal(state_of(optimizer), state_of(plain))
    # And both ways of going on, without the hooks, and with them.
    train(model, optimizer, 2, begin=4)
    released(twin, plain, 2, begin=4)
    assert_equal(weights(model), weights(twin))


def test_groups_and_schedules_stay_the_optimizers():
    model, twin = network(), network()

    def groups(model):
        first, second, third = model[0], model[2], model[4]
        return [
            {"params": first.parameters(), "zmg": 0.0},
            {"params": second.parameters(), "lr": 0.025},
            {"params": third.parameters(), "luma": 0.25},
        ]

    optimizer, plain = (FusedCZMSGD(groups(each), **CZM) for each in (model, twin))
    schedules = [lr_scheduler.CosineAnnealingLR(each, 5) for each in (optimizer, plain)]
    GradientRelease(optimizer)
    for seed in range(4):
        for each, which in ((model, optimizer), (twin, plain)):
            backward(each, seed)
            # The training loop need not change.
            which.step()
        for schedule in schedules:
            schedule.step()
        assert_equal(weights(model), weights(twin))
    assert optimizer.param_groups[1]["lr"] == plain.param_groups[1]["lr"] < 0.025


def test_state_is_loaded_while_gradients_are_released():
    model, twin = network(), network()
    plain = FusedCZMSGD(twin.parameters(), **CZM)
    train(twin, plain, 3)
    optimizer = FusedCZMSGD(model.parameters(), lr=7.0)
    GradientRelease(optimizer)
    backward(model, 0)
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for seed in range(3, 5):
        backward(model, seed)
        backward(twin, seed)
        plain.step()
    assert_equal(weights(model), weights(twin))
    assert_equal(optimizer.state_dict()["state"], plain.state_dict()["state"])


def test_gradients_of_one_layer_exist_at_a_time():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    alive = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    GradientRelease(optimizer)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
    assert alive == [1] * 12


def test_hooks_of_the_step_run_in_the_step_alone():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))
    GradientRelease(optimizer)
    backward(model, 0)
    assert ran == []
    optimizer.step()
    assert ran == ["before", "after"]


def test_a_shared_weight_is_stepped_once():
    weight = nn.Parameter(torch.ones(3, 2, 3, 3))
    twin = nn.Parameter(weight.detach().clone())
    optimizer, plain = (FusedCZMSGD([p], **CZM) for p in (weight, twin))
    GradientRelease(optimizer)
    x = torch.randn(1, 2, 5, 5)
    for p in (weight, twin):
        sum(nn.functional.conv2d(factor * x, p).square().sum() for factor in (1, 2)).backward()
    plain.step()
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpoints_that_share_no_parameter_step_as_without(use_reentrant):
    model, twin = network(), network()
    optimizer, plain = (FusedCZMSGD(each.parameters(), **CZM) for each in (model, twin))
    GradientRelease(optimizer)
    for _ in range(2):
        x = torch.randn(4, 3, 6, 6).requires_grad_()
        for each in (model, twin):
            each.zero_grad()
            y = x
            for module in each:
                y = checkpoint(module, y, use_reentrant=use_reentrant)
            y.square().mean().backward()
        plain.step()
    assert_equal(weights(model), weights(twin))
    assert_equal(state_of(optimizer), state_of(plain))


def test_checkpoints_that_share_a_parameter():
    shared, twin = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
    twin.load_state_dict(shared.state_dict())
    optimizer, plain = (FusedCZMSGD(each.parameters(), **CZM) for each in (shared, twin))
    GradientRelease(optimizer)
    x = torch.randn(2, 3, 5, 5).requires_grad_()

    def loss(module):
        y = checkpoint(module, x, use_reentrant=False)
        return checkpoint(module, y, use_reentrant=False).square().mean()

    for _ in range(2):
        loss(shared).backward()
        plain.zero_grad()
        loss(twin).backward()
        plain.step()
    assert_equal(weights(shared), weights(twin))


def test_frozen_and_unused_parameters():
    model = network()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="parameter 0 of group 0 needs no gradient"):
        GradientRelease(FusedCZMSGD(model.parameters(), **CZM))
    unused = nn.Parameter(torch.ones(3))
    before = unused.detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = FusedCZMSGD([*trained, unused], **CZM)
    GradientRelease(optimizer)
    backward(model, 0)
    assert torch.equal(unused, before) and unused not in optimizer.state


def test_waiting_gradients_and_other_optimizers_are_refused():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    backward(model, 0)
    with pytest.raises(ValueError, match="parameter 0 of group 0 has a gradient already"):
        GradientRelease(optimizer)
    with pytest.raises(TypeError, match="must be a FusedCZMSGD, but was a SGD"):
        GradientRelease(torch.optim.SGD(model.parameters()))


def test_complex_parameters_without_filters():
    model, twin = (nn.Conv2d(3, 4, 3, dtype=torch.complex64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer, plain = (FusedCZMSGD(each.parameters(), **CZM, **PLAIN) for each in (model, twin))
    GradientRelease(optimizer)
    x = torch.randn(2, 3, 5, 5, dtype=torch.complex64)
    for each in (model, twin):
        each(x).abs().square().mean().backward()
    plain.step()
    assert_equal(weights(model), weights(twin))


@pytest.mark.usefixtures("fully_shard")
def test_sharded_parameters_without_filters():
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 3, 3, 3), mesh, [Shard(1)]))
    optimizer = FusedCZMSGD([weight], **CZM, **PLAIN)
    GradientRelease(optimizer)
    weight.square().sum().backward()
    torch.testing.assert_close(weight.full_tensor(), torch.full((4, 3, 3, 3), 0.8))


@pytest.mark.parametrize("scale", [None, 2.0], ids=["unscaled", "scaled"])
def test_a_grad_scaler_is_refused(scale):
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, backend=BACKENDS[-1])
    release = GradientRelease(optimizer)
    # So torch hands them over: no scale if it has unscaled the gradients itself.
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match="a GradScaler cannot unscale them"):
        optimizer.step()
    release.remove()
    optimizer.step()


def test_what_is_dropped_is_freed():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    release = GradientRelease(optimizer)
    backward(model, 0)
    alive = [weakref.ref(each) for each in (optimizer, *model.parameters())]
    del model, optimizer, release
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


def test_gradients_stay_where_the_optimizer_is_gone():
    model = network()
    GradientRelease(FusedCZMSGD(model.parameters(), **CZM))
    gc.collect()
    backward(model, 0)
    assert all(param.grad is not None for param in model.parameters())


def test_removing_twice_leaves_the_next_release_alone():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    first = GradientRelease(optimizer)
    first.remove()
    GradientRelease(optimizer)
    first.remove()
    assert optimizer._step_supports_amp_scaling
