"""czm_param_groups: every parameter once, in the group where it belongs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from czm_fused import FusedCZMSGD
from czm_fused.groups import SETTINGS, ParamGroups, czm_param_groups
from czm_fused.nn import CZMConv2d, exp_scale


class Network(nn.Module):
    """Registers its convolutions in another order than it runs them, and has one of everything."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.pointwise = nn.Conv2d(4, 8, 1)
        self.spatial = nn.Conv2d(4, 4, 3, padding=1)
        self.reader = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.token = nn.Parameter(torch.zeros(4, 3, 3))

    def forward(self, x, scale=1.0):
        x = nn.functional.dropout(x * scale, training=True)
        x = self.norm(self.up(self.reader(x)))
        return self.head(self.pointwise(self.spatial(x)).mean((2, 3)))


def by_name(groups: ParamGroups) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in groups}


# Network has a BatchNorm on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:model still has BatchNorms")

IMAGE = torch.zeros(1, 3, 4, 4)
EXPECTED = {
    "stem": ["reader.weight"],
    "spatial": ["spatial.weight"],
    "pointwise": ["pointwise.weight"],
    "rest": [
        "token",
        "head.weight",
        "head.bias",
        "pointwise.bias",
        "spatial.bias",
        "norm.weight",
        "norm.bias",
        "up.weight",
        "up.bias",
    ],
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"stem": "reader"},
        {"example_input": IMAGE},
        {"example_input": (IMAGE, 2.0)},
        {"example_input": {"x": IMAGE, "scale": 2.0}},
    ],
)
def test_every_parameter_is_in_the_group_where_it_belongs(arguments):
    network = Network()
    groups = czm_param_groups(network, **arguments)
    assert by_name(groups) == EXPECTED
    assert by_name(czm_param_groups(network, stem=network.reader)) == EXPECTED
    parameters = dict(network.named_parameters())
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameters.pop(name) is parameter
        assert {key: group[key] for key in SETTINGS[group["name"]]} == SETTINGS[group["name"]]
    assert not parameters


def test_settings_are_what_the_method_needs_and_nothing_else():
    groups = czm_param_groups(Network(), stem="reader")
    own = ("name", "params", "param_names")
    settings = [{k: v for k, v in g.items() if k not in own} for g in groups]
    assert settings == [
        {"exp_scale": True, "zmg": 0.0},
        {"exp_scale": True},
        {"exp_scale": True, "zmg": 0.0},
        {"exp_scale": False, "zmg": 0.0, "luma": 0.0, "grad_norm": 0.0, "max_filter_dim": 2},
    ]


def test_overrides_replace_settings_of_their_group_only():
    groups = czm_param_groups(
        Network(),
        stem="reader",
        overrides={"rest": {"lr": 0.1, "luma": 5e-4}, "stem": {"zmg": 1.0}},
    )
    stem, spatial, _, rest = groups
    assert (rest["lr"], rest["luma"], rest["zmg"], stem["zmg"]) == (0.1, 5e-4, 0.0, 1.0)
    assert "lr" not in spatial
    assert SETTINGS["rest"]["luma"] == SETTINGS["stem"]["zmg"] == 0.0


def test_biases_of_convolutions_have_a_group_if_something_is_set_for_them():
    model = Network()
    groups = czm_param_groups(model, example_input=IMAGE, overrides={"bias": {"lr": 0.01}})
    biases = ["pointwise.bias", "spatial.bias"]
    assert by_name(groups) == {
        **EXPECTED,
        "rest": [name for name in EXPECTED["rest"] if name not in biases],
        "bias": biases,
    }
    assert groups[-1] == {**groups[-1], **SETTINGS["rest"], "lr": 0.01}
    assert [group["lr"] for group in FusedCZMSGD(groups, lr=0.1).param_groups][-2:] == [0.1, 0.01]


def test_stem_is_the_first_registered_convolution_if_nothing_else_is_said():
    groups = czm_param_groups(Network())
    assert by_name(groups)["stem"] == ["pointwise.weight"]
    assert "pointwise" not in by_name(groups)


def test_stem_is_what_was_built_as_stem():
    network = nn.Sequential(CZMConv2d(3, 3, 1), CZMConv2d(3, 4, 3, stem=True))
    assert by_name(czm_param_groups(network))["stem"] == ["1.weight"]
    assert by_name(czm_param_groups(network, stem="0"))["stem"] == ["0.weight"]


def test_example_input_leaves_no_trace():
    network = Network().train()
    network.norm.eval()
    modes = [module.training for module in network.modules()]
    buffers = [buffer.clone() for buffer in network.buffers()]
    state = torch.get_rng_state()
    czm_param_groups(network, example_input=IMAGE)
    assert modes == [module.training for module in network.modules()]
    assert all(map(torch.equal, buffers, network.buffers()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_example_input_that_fails_leaves_no_trace_either():
    network = Network().train()
    with pytest.raises(TypeError):
        czm_param_groups(network, example_input={"nonsense": 1})
    assert all(module.training for module in network.modules())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_shared_parameters_are_listed_once_and_the_stem_wins():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3))
    network[1].weight = network[0].weight
    network[2].weight = network[0].weight
    for stem in ("0", "1"):
        groups = by_name(czm_param_groups(network, stem=stem))
        assert groups["stem"] == ["0.weight"]
        assert sorted(sum(groups.values(), [])) == ["0.bias", "0.weight", "1.bias", "2.bias"]
    again = nn.Sequential(network[0], network[0])
    assert by_name(czm_param_groups(again)) == {"stem": ["0.weight"], "rest": ["0.bias"]}


def test_frozen_parameters_are_kept():
    network = Network().requires_grad_(False)
    assert by_name(czm_param_groups(network, stem="reader")) == EXPECTED


def test_kernels_of_any_dimension_are_told_apart_by_their_taps():
    network = nn.Sequential(
        nn.Conv1d(3, 3, 2), nn.Conv1d(3, 3, 1), nn.Conv3d(3, 3, (1, 1, 2)), nn.Conv3d(3, 3, 1)
    )
    groups = by_name(czm_param_groups(network, stem="0"))
    assert groups["spatial"] == ["2.weight"]
    assert groups["pointwise"] == ["1.weight", "3.weight"]


def test_depthwise_filters_keep_the_mean_of_their_gradient():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.Conv2d(8, 1, 3),
        nn.Conv2d(1, 8, 3),
    )
    groups = czm_param_groups(network)
    names = by_name(groups)
    assert names["depthwise"] == ["1.weight", "2.weight"]
    assert names["spatial"] == ["3.weight", "5.weight", "6.weight"]
    assert names["pointwise"] == ["4.weight"]
    depthwise = next(group for group in groups if group["name"] == "depthwise")
    assert depthwise["zmg"] == 0.0 and depthwise["exp_scale"]
    overridden = czm_param_groups(network, overrides={"depthwise": {"zmg": 0.85}})
    assert [g["zmg"] for g in overridden if g["name"] == "depthwise"] == [0.85]


def test_parameters_of_exp_scale_are_among_the_rest():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    exp_scale(network[1])
    groups = by_name(czm_param_groups(network))
    assert groups["stem"] == ["0.weight"]
    assert groups["rest"] == [
        "1.parametrizations.weight.original0",
        "1.parametrizations.weight.original1",
    ]
    assert "spatial" not in groups


def test_complex_filters_are_among_the_rest_and_train():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, dtype=torch.complex64))
    groups = czm_param_groups(network)
    assert by_name(groups) == {"stem": ["0.weight"], "rest": ["0.bias", "1.weight", "1.bias"]}
    assert groups.notes[-1] == "rest: holds the complex convolutions 1, as filters must be real"
    optimizer = FusedCZMSGD(groups, lr=0.1)
    before = network[1].weight.detach().clone()
    network[1](network[0](torch.ones(2, 3, 7, 7)).to(torch.complex64)).abs().sum().backward()
    optimizer.step()
    assert not torch.equal(network[1].weight, before)


def test_a_model_without_convolutions_has_the_rest_alone():
    groups = czm_param_groups(nn.Linear(2, 2), example_input=torch.zeros(1, 2))
    assert by_name(groups) == {"rest": ["weight", "bias"]}
    assert "no convolution" in str(groups)
    assert czm_param_groups(nn.ReLU()) == []


def test_printed_groups_say_what_was_decided():
    text = str(czm_param_groups(Network(), stem="reader", overrides={"rest": {"lr": 0.1}}))
    lines = text.splitlines()
    assert lines[0].split() == ["group", "parameters", "weights", "settings", "names"]
    assert [line.split()[0] for line in lines[1:5]] == list(EXPECTED)
    assert "lr=0.1" in lines[4]
    assert "144" in lines[2]
    assert lines[5] == "stem: 'reader' (named by the caller)"
    assert lines[6].startswith("rest: holds the transposed convolutions up,")


def test_torch_optimizers_take_the_groups_and_keep_names_through_a_state_dict():
    network = Network()
    groups = [dict(group) for group in czm_param_groups(network, stem="reader")]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    network(IMAGE + 1).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert [group["param_names"] for group in state["param_groups"]] == list(EXPECTED.values())
    optimizer.load_state_dict(state)
    extra = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [("extra", extra)]})
    assert optimizer.param_groups[-1]["param_names"] == ["extra"]


def test_fused_czm_sgd_takes_the_groups():
    network = Network()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    groups = czm_param_groups(network, stem="reader", overrides={"rest": {"lr": 0.01}})
    optimizer = FusedCZMSGD(groups, lr=0.1, momentum=0.9)
    network(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    modules = ("reader", "spatial", "pointwise", "head", "up")
    assert moved >= {f"{module}.weight" for module in modules}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.01]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "head"}, "stem must name a convolution of the model, one of 'pointwise'"),
        ({"stem": nn.Conv2d(1, 1, 1)}, "stem must be a convolution of the model"),
        ({"overrides": {"biases": {}}}, "among stem, .*, rest, bias; but named 'biases'"),
        ({"overrides": {"rest": {"betas": 1}}}, "hyperparameters among lr, .*; but set 'betas'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        czm_param_groups(Network(), **arguments)


def test_example_input_must_reach_a_convolution():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="example_input must reach a convolution"):
        czm_param_groups(Bypass(), example_input=IMAGE)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.filterwarnings("error:the groups of czm_param_groups")
def test_another_optimizer_is_noticed(make):
    groups = czm_param_groups(plain())
    with pytest.warns(UserWarning, match="must go to FusedCZMSGD, but another optimizer") as seen:
        make(groups, lr=0.1)
    assert {warning.filename for warning in seen} == {__file__}
    make([dict(group) for group in groups], lr=0.1)
    optimizer = FusedCZMSGD(groups, lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)


def test_batch_norms_in_the_model_are_warned_about_by_name():
    with pytest.warns(UserWarning, match=r"has BatchNorms, norm: call convert\(model\) first"):
        groups = czm_param_groups(Network())
    assert "still has BatchNorms, norm" in groups.notes[-1]


@pytest.mark.parametrize(
    "wrap",
    [lambda c: prune.identity(c, "weight"), parametrizations.weight_norm, nn.utils.spectral_norm],
)
def test_computed_weights_are_warned_about_by_name(wrap):
    network = plain()
    wrap(network[2])
    with pytest.warns(UserWarning, match="weights of 2 are computed from other parameters"):
        czm_param_groups(network)


@pytest.mark.filterwarnings("error")
def test_exp_scale_is_not_warned_about():
    network = plain()
    exp_scale(network[2])
    czm_param_groups(network)


class Tokens(nn.Module):
    """The parameters of three dimensions and more that are no filters."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 4, 4, 4))
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.experts = nn.Parameter(torch.ones(2, 4, 4))
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.convolution = nn.Conv2d(3, 4, 3, bias=False)


def test_only_convolutions_have_filters():
    network = Tokens()
    groups = czm_param_groups(network)
    rest = ["position", "token", "experts", "bilinear.weight", "bilinear.bias"]
    assert by_name(groups) == {"stem": ["convolution.weight"], "rest": rest}
    optimizer = FusedCZMSGD(groups, lr=0.5, momentum=0.0, backend="reference")
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer.step()
    for name in rest:
        # Plain SGD: no scale, no anchor, no mean taken away.
        torch.testing.assert_close(network.get_parameter(name).detach(), before[name] - 0.5)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (plain().parameters(), "generator"),
        (list(plain().named_parameters()), "list"),
        (plain().state_dict(), "OrderedDict"),
    ],
)
def test_parameters_instead_of_the_model_are_refused(model, kind):
    with pytest.raises(TypeError, match=f"but was of type {kind}; pass the model itself"):
        czm_param_groups(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (0.1, "overrides must be a dictionary such as .*, but was 0.1"),
        ([("rest", {})], "overrides must be a dictionary such as"),
        ({"rest": 0.2}, r'overrides\[\'rest\'\] .* but was 0.2; write {"rest": {"lr": 0.2}}'),
        ({"stem": None}, r'but was None; write {"stem": {"lr": 0.1}}'),
    ],
)
def test_overrides_that_are_no_settings_are_refused(overrides, message):
    with pytest.raises(TypeError, match=message):
        czm_param_groups(plain(), overrides=overrides)


def test_scripted_models_are_refused():
    with pytest.raises(ValueError, match="it is scripted or traced by torch.jit"):
        czm_param_groups(torch.jit.script(plain()))


def test_groups_are_shown_without_the_values_of_their_parameters():
    groups = czm_param_groups(plain())
    assert repr(groups) == str(groups)
    assert repr(groups[0]) == (
        "ParamGroup('stem': 1 parameters, 108 weights, {'exp_scale': True, 'zmg': 0.0})"
    )
    html = groups._repr_html_()
    assert html.startswith("<table>") and "<td>spatial</td>" in html
    assert len(html) < 1500


@pytest.mark.parametrize("duplicate", [copy.copy, ParamGroups.copy])
def test_copies_share_parameters_and_nothing_else(duplicate):
    groups = czm_param_groups(plain())
    copies = duplicate(groups)
    copies[0]["lr"] = 0.3
    copies[0]["params"].clear()
    assert "lr" not in groups[0]
    assert len(groups[0]["params"]) == 1
    assert copies[1]["params"][0] is groups[1]["params"][0]
    assert copies.notes == groups.notes


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(3, 3), nn.LazyLinear(3)])
def test_lazy_modules_are_refused_by_name(lazy):
    with pytest.raises(ValueError, match="'1.weight' of a lazy module has no shape yet"):
        czm_param_groups(nn.Sequential(nn.Conv2d(3, 3, 3), copy.deepcopy(lazy)))
