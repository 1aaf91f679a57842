"""State and options that FusedCZMSGD loads by the names of the parameters."""

import copy

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD, czm_param_groups
from small_training import CZM, assert_equal, network, state_of, train


def named_optimizer(model, stem):
    return FusedCZMSGD(czm_param_groups(model, stem=stem), **CZM)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_orig_mod.module."]
)
def test_state_is_matched_by_name(prefix):
    """Groups of another order get the state of their parameters, not of their places."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    optimizer = named_optimizer(model, "0")
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    other = named_optimizer(model, "1")
    other.load_state_dict(saved)
    for param in model.parameters():
        assert_equal(other.state[param], optimizer.state[param])
    assert [group["param_names"][0] for group in other.param_groups] == [
        "1.weight", "0.weight", "0.bias"
    ]  # fmt: skip
    assert [group["name"] for group in other.param_groups] == ["spatial", "stem", "rest"]


def grouped(model, *groups, make=FusedCZMSGD):
    """Return an optimizer of groups, each of some modules with options of its own."""
    return make(
        [
            {
                "params": [
                    (f"{index}.{name}", param)
                    for index in indices
                    for name, param in model[index].named_parameters()
                ],
                **options,
            }
            for indices, options in groups
        ],
        **CZM,
    )


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("make", [FusedCZMSGD, torch.optim.SGD])
def test_options_are_matched_by_name(make):
    model = network()
    saved = grouped(model, ((0,), {"lr": 0.4, "tag": "stem"}), ((2, 4), {"lr": 0.01}), make=make)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(saved, 0.5)
    train(model, saved, 1)
    scheduler.step()
    other = grouped(model, ((4, 2), {"lr": 7.0}), ((0,), {"zmg": 0.25}))
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    rest, stem = other.param_groups
    assert (stem["lr"], stem["initial_lr"], stem["tag"]) == (0.2, 0.4, "stem")
    assert (rest["lr"], rest["initial_lr"]) == (0.005, 0.01)
    assert stem["zmg"] == (0.25 if make is torch.optim.SGD else 0.85)
    for param in model.parameters():
        buffers = [each.state[param]["momentum_buffer"] for each in (saved, other)]
        assert torch.equal(*buffers)


def test_groups_that_are_split_or_joined_keep_their_options():
    model = network()
    apart = [((0,), {"lr": 0.4}), ((2,), {"lr": 0.01}), ((), {"lr": 0.3}), ((4,), {"lr": 0.01})]
    joined = [((4, 2), {"lr": 7.0}), ((0,), {"lr": 8.0}), ((), {"lr": 9.0})]
    one = grouped(model, *apart)
    train(model, one, 1)
    other = grouped(model, *joined)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert rates(other) == [0.01, 0.4, 0.3]
    back = grouped(model, *[(indices, {}) for indices, _ in apart])
    back.load_state_dict(copy.deepcopy(other.state_dict()))
    assert rates(back) == rates(one)
    assert_equal(state_of(back), state_of(one))


@pytest.mark.parametrize("as_tensors", [False, True])
def test_groups_of_different_options_are_not_joined(as_tensors):
    model = network()
    saved = [torch.tensor(lr) if as_tensors else lr for lr in (0.5, 0.25, 0.5)]
    one = grouped(model, *[((i,), {"lr": lr}) for i, lr in zip((0, 2, 4), saved, strict=True)])
    train(model, one, 1)
    other = grouped(model, ((2,), {}), ((0, 4), {}))
    other.load_state_dict(one.state_dict())
    assert rates(other) == [0.25, 0.5]
    other = grouped(model, ((4,), {}), ((0, 2), {}))
    message = r"must have one lr for all parameters of group 1, but has .*0\.5.* and .*0\.25"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(one.state_dict())
    assert rates(other) == [0.1, 0.1] and not other.state


def test_groups_that_are_split_have_tensors_of_their_own():
    model = network()
    other = grouped(model, ((0,), {}), ((2,), {}))
    other.load_state_dict(grouped(model, ((0, 2), {"lr": torch.tensor(0.5)})).state_dict())
    other.param_groups[0]["lr"].fill_(1.0)
    assert rates(other) == [1.0, 0.5]


def named(*names):
    """Return an optimizer of a parameter by each name, whose momentum is its place."""
    params = [(name, nn.Parameter(torch.zeros(2))) for name in names]
    optimizer = FusedCZMSGD(params, **CZM)
    for place, (_, param) in enumerate(params):
        optimizer.state[param]["momentum_buffer"] = torch.full((2,), float(place))
    return optimizer


def momenta(optimizer):
    params = optimizer.param_groups[0]["params"]
    return [optimizer.state[param]["momentum_buffer"][0].item() for param in params]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_checkpoint_wrapped_module."])
def test_names_that_differ_by_a_wrapper_are_told_apart(wrapper):
    saved = named("weight", wrapper + "weight").state_dict()
    other = named(wrapper + "weight", "weight")
    other.load_state_dict(saved)
    assert momenta(other) == [1, 0]
    twice = "_orig_mod._orig_mod.weight"
    for name, message in (("new", "lacks new; make"), (twice, "param_names must differ")):
        other = named(name, "weight")
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved)
        assert momenta(other) == [0, 1]


def test_names_of_a_module_called_module_are_matched_in_ddp():
    saved, other = named("weight", "module.weight"), named("module.module.weight", "module.weight")
    other.load_state_dict(saved.state_dict())
    assert momenta(other) == [1, 0]
    saved.load_state_dict(other.state_dict())
    assert momenta(saved) == [0, 1]


def test_names_that_repeat_are_told_apart_by_their_places():
    saved, other = named("weight", "bias", "weight"), named("weight", "bias", "weight")
    saved.state_dict()["state"][2]["momentum_buffer"].fill_(7.0)
    other.load_state_dict(saved.state_dict())
    assert momenta(other) == [0, 1, 7]
    with pytest.raises(ValueError, match="param_names must differ .* several are weight"):
        named("weight", "weight", "bias").load_state_dict(saved.state_dict())


def test_names_of_another_network_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    other = nn.Sequential()
    other.add_module("first", model[0])
    other.add_module("1", model[1])
    optimizer = named_optimizer(model, "0")
    message = "lacks 0.bias, 0.weight and has first.bias, first.weight"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(named_optimizer(other, "first").state_dict())


def test_a_group_without_names_joins_those_that_have_some():
    model = network()
    optimizer = named_optimizer(model[:2], "0")
    for added in (model[2].weight, model[4].parameters()):
        optimizer.add_param_group({"params": added})
    names = [name for group in optimizer.param_groups[2:] for name in group["param_names"]]
    assert names == ["group2.0", "group3.0", "group3.1"]
    train(model, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "log_scale" in optimizer.state[model[2].weight]
