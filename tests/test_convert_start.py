"""convert: the weights that its convolutions start with, and the stem."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from czm_fused import convert, czm_param_groups
from helpers.conversion import IMAGE, Function, conv, converted, randomised, relative_difference


def test_stem_is_found_marked_and_keeps_its_means():
    def function(m, x):
        return m.later(m.norm(m.reader(x)))

    model = Function(function, later=conv(), reader=conv(3), norm=nn.BatchNorm2d(4))
    plan = converted(model, example_input=IMAGE)
    assert plan.stem == ("reader",)
    assert czm_param_groups(model)[0]["param_names"] == ["reader.weight"]
    means = {n: m.weight.mean((2, 3)).abs().max() for n, m in model.named_children() if n != "norm"}
    # A mean of 9 weights below 0.8, in float32: zero to 9 * 2^-24.
    assert means["later"] < 6e-7 < 1e-3 < means["reader"]

    assert converted(model, example_input=IMAGE, stem="later").stem == ("later",)
    assert czm_param_groups(model)[0]["param_names"] == ["later.weight"]


@pytest.mark.parametrize(
    ("arguments", "is_zero_mean"),
    [({}, False), ({"gain": 0.8}, True), ({"gain": 0.8, "zero_mean": False}, False)],
)
def test_filters_start_with_any_mean_unless_a_gain_is_given(arguments, is_zero_mean):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
    convert(model, **arguments)
    # As above: below 6e-7 where it is 0.
    assert (model[3].weight.mean((2, 3)).abs().max() < 6e-7) == is_zero_mean


def test_generator_and_gain_reach_the_initialisation():
    def initialised(seed):
        model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
        convert(model, generator=torch.Generator().manual_seed(seed), gain=0.5)
        return model[0].weight.detach()

    assert torch.equal(initialised(1), initialised(1))
    assert not torch.equal(initialised(1), initialised(2))
    torch.testing.assert_close(initialised(1).flatten(1).norm(dim=1), torch.full((4,), 0.5))


@pytest.mark.parametrize("target", [None, 0.3])
def test_target_is_the_spread_of_outputs(target):
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
    images = torch.rand(16, 3, 8, 8)
    convert(model, example_input=images, target=target)
    spread = model(images).var(dim=(0, 2, 3), correction=0).mean().sqrt()
    # 14 by 14 by 16 values in float32, two layers.
    torch.testing.assert_close(spread, torch.tensor(target or 1.0), rtol=1e-5, atol=0)


class Gated(nn.Module):
    """A convolution with BatchNorm and squeeze-and-excitation, as in RegNetY."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def test_convolutions_without_batch_norm_keep_their_start():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    for gain in (None, 0.8):
        model = Gated()
        before = copy.deepcopy(model.state_dict())
        convert(model, example_input=images, gain=gain)
        after = model.state_dict()
        same = [name for name in after if name in before and torch.equal(before[name], after[name])]
        own = ["squeeze.weight", "squeeze.bias", "excite.weight", "excite.bias"]
        assert same == (own if gain is None else [])


def test_start_is_measured_under_autocast():
    torch.manual_seed(0)
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers)
    images = torch.randn(16, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        # The user's own pass, whose casts of weights autocast keeps for the region.
        model.eval()(images)
        convert(model, example_input=images)
        within = model(images).float()
    for output in (within, model(images)):
        spread = output.var(dim=(0, 2, 3), correction=0).mean().sqrt()
        # Weights, inputs and outputs of two layers, rounded to 8 bits: below 8 * 2^-9.
        torch.testing.assert_close(spread, torch.tensor(1.0), rtol=8 * 2**-9, atol=0)


def test_pretrained_weights_are_folded_under_autocast():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(conv(3), nn.BatchNorm2d(4))).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        convert(model, example_input=IMAGE, from_pretrained=True)
        # Weights, inputs and outputs are rounded to 8 bits: a few times 2^-9.
        assert relative_difference(model(images), expected) < 4 * 2**-9


NOTHING_TO_REMOVE = {
    "no normalisation": lambda: nn.Sequential(conv(3), nn.ReLU(), conv()),
    "another normalisation": lambda: nn.Sequential(conv(3), nn.GroupNorm(2, 4), conv()),
    "converted": lambda: convert(nn.Sequential(conv(3), nn.BatchNorm2d(4), conv())),
    "pretrained": lambda: convert(
        randomised(nn.Sequential(conv(3), nn.BatchNorm2d(4), conv())), from_pretrained=True
    ),
}


@pytest.mark.parametrize("gain", [None, 0.8])
@pytest.mark.parametrize("case", NOTHING_TO_REMOVE)
def test_weights_stay_where_there_is_no_batch_norm_to_remove(case, gain):
    model = NOTHING_TO_REMOVE[case]()
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"its weights stay as they were; czm_init_\(model, "):
        plan = converted(model, example_input=torch.randn(16, 3, 8, 8), gain=gain)
    assert "2 convolutions: weights kept" in str(plan)
    assert str(model) == str(twin)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])
