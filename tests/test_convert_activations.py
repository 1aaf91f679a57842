"""convert: ReLU6, and what is changed in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from czm_fused import convert
from czm_fused.nn import ReLU6
from helpers.conversion import (
    IMAGE,
    Function,
    conv,
    converted,
    evaluated,
    randomised,
    relative_difference,
)


def test_relu6_keeps_less_for_backward_and_its_hooks():
    hooked = nn.ReLU6()
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU6(), hooked, nn.Hardtanh())
    convert(model.eval(), example_input=IMAGE, gain=0.8)
    assert type(model[2]) is ReLU6 and not model[2].training
    assert model[3] is hooked and type(model[4]) is nn.Hardtanh


def called_for_its_effect(m, x):
    y = m.norm(m.conv(x))
    m.relu(y)
    return y


def added_to(m, x):
    y = m.relu(m.norm(m.conv(x)))
    y += x.sum()
    return y


def added_to_in_part(m, x):
    y = m.relu(m.norm(m.conv(x)))
    y[:, :2] += x.sum()
    return y


def dropped_out(m, x):
    return m.drop(m.relu(m.norm(m.conv(x))))


def multiplied(m, x):
    return 2 * m.relu(m.norm(m.conv(x)))


def network(function, inplace):
    modules = {"conv": conv(3), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU6(inplace)}
    return Function(function, **modules, drop=nn.Dropout2d(0.1, inplace=True))


RESULTS = {
    called_for_its_effect: ReLU6,
    multiplied: ReLU6,
    added_to: nn.ReLU6,
    added_to_in_part: nn.ReLU6,
    dropped_out: nn.ReLU6,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("from_pretrained", [False, True])
@pytest.mark.parametrize("function", RESULTS)
def test_relu6_writes_over_its_input_and_its_result_may_be_changed(
    function, from_pretrained, inplace
):
    torch.manual_seed(0)
    model = randomised(network(function, inplace))
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    plan = converted(model, example_input=IMAGE, from_pretrained=from_pretrained)
    kind = RESULTS[function]
    assert type(model.relu) is kind and model.relu.inplace == inplace
    assert plan.activations == (("relu",) if kind is ReLU6 else ())
    if from_pretrained:
        # Some ten operators on numbers about 1, in float32: below 100 * 2^-24.
        assert relative_difference(evaluated(model, images), expected) < 6e-6
    twin = copy.deepcopy(model)
    twin.relu = nn.ReLU6(inplace)
    for each in (model, twin):
        torch.manual_seed(1)
        each.train()(images).sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, twin.conv.weight.grad, rtol=0, atol=0)


def test_relu6_in_place_leaves_what_is_needed_elsewhere():
    def function(m, x):
        y = m.conv(x)
        return y + m.relu(m.norm(y))

    model = network(function, inplace=True)
    convert(model, example_input=IMAGE, gain=0.8)
    images = torch.randn(2, 3, 8, 8)
    y = model.conv(images)
    torch.testing.assert_close(model(images), y + y.clamp(0, 6), rtol=0, atol=0)
