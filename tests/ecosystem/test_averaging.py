"""torch's weight averaging, torch.save and deepcopy around a training with FusedCZMSGD."""

import copy

import pytest
import torch
from short_training import (
    assert_same,
    loss_of,
    network,
    optimizer_of,
    train,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn


@pytest.mark.parametrize("use_buffers", [False, True])
def test_exponential_moving_average(use_buffers):
    model = network()
    optimizer = optimizer_of(model)
    ema = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=use_buffers
    )
    expected = None
    for step in range(20):
        train(model, optimizer, 1, begin=step)
        ema.update_parameters(model)
        weights = [p.detach().double() for p in model.parameters()]
        expected = weights if expected is None else [
            0.75 * mean + 0.25 * weight for mean, weight in zip(expected, weights, strict=True)
        ]
    # 20 averages of weights below 4, each rounded twice.
    for mean, weight in zip(ema.parameters(), expected, strict=True):
        assert weight.abs().max() < 4
        assert (mean - weight).abs().max() <= 20 * 2 * 4 * torch.finfo(torch.float32).eps
    assert loss_of(ema) < 0.7 * loss_of(network())


def test_stochastic_weight_averaging_under_its_schedule():
    model = network()
    optimizer = optimizer_of(model)
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=16, anneal_strategy="linear")
    swa = AveragedModel(model)
    trail = []
    for step in range(20):
        train(model, optimizer, 1, begin=step)
        if step >= 16:
            swa.update_parameters(model)
            trail.append([p.detach().clone() for p in model.parameters()])
        schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    for mean, *weights in zip(swa.parameters(), *trail, strict=True):
        torch.testing.assert_close(mean, torch.stack(weights).mean(dim=0))
    # There are no running statistics to gather anew: the average is at once a network.
    assert loss_of(swa) < 0.8 * loss_of(network())


def test_training_goes_on_from_a_file(tmp_path):
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt"
    )
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    twin = network(seed=1)
    twin.load_state_dict(saved["model"])
    twin_optimizer = optimizer_of(twin)
    twin_optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 3, begin=3)
    train(twin, twin_optimizer, 3, begin=3)
    assert_same(twin.state_dict(), model.state_dict())
    assert_same(twin_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


def test_copies_train_apart():
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    train(twin, twin_optimizer, 2, begin=2)
    assert_same(model.state_dict(), before)
    train(model, optimizer, 2, begin=2)
    assert_same(twin.state_dict(), model.state_dict())


def test_a_state_dict_holds_nothing_but_weights():
    model = network()
    train(model, optimizer_of(model), 1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
