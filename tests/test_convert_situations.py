"""convert in situations that other people's programs bring: hooks, leaks, wrappers, refusals."""

from __future__ import annotations

import copy
import gc
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from czm_fused import FusedCZMSGD, convert, czm_param_groups, plan_conversion
from czm_fused.nn import ChannelNoise
from helpers.conversion import (
    IMAGE,
    Function,
    actions,
    conv,
    converted,
    evaluated,
    randomised,
    relative_difference,
    remarks,
)

# Some ten operators on numbers about 1, in float32: below 100 * 2^-24.
ROUNDING = 6e-6


@dataclass
class Result:
    features: object
    logits: torch.Tensor


def same_state(model: nn.Module, twin: nn.Module) -> bool:
    a, b = model.state_dict(), twin.state_dict()
    same = a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))
    return same and list(map(type, model.modules())) == list(map(type, twin.modules()))


def in_dataclass(m, x):
    return Result(y := m.conv(x), m.norm(y))


def in_attribute(m, x):
    m.kept = m.conv(x)
    return Result(None, m.norm(m.kept))


def as_data(m, x):
    y = m.conv(x)
    m.kept = {"y": [y.data]}
    return Result(None, m.norm(y))


def as_array(m, x):
    y = m.conv(x)
    m.kept = y.detach().numpy()
    return Result(None, m.norm(y))


@pytest.mark.parametrize("function", [in_dataclass, in_attribute, as_data, as_array])
def test_convolution_output_that_outlives_the_pass_is_not_folded(function):
    torch.manual_seed(0)
    model = randomised(Function(function, conv=conv(3), norm=nn.BatchNorm2d(4)))
    images = torch.randn(2, 3, 8, 8)
    weight = model.conv.weight.detach().clone()
    expected = evaluated(model, images)
    plan = converted(model, example_input=IMAGE, from_pretrained=True)
    assert actions(plan) == {"norm": "affine"}
    assert torch.equal(model.conv.weight, weight) and model.conv.bias is None
    result = evaluated(model, images)
    assert relative_difference(result.logits, expected.logits) < ROUNDING
    if function is in_dataclass:
        assert torch.equal(result.features, expected.features)


def read_by_hook(module, args, output):
    output.mean()


def changed_by_hook(module, args, output):
    return 2 * output


@pytest.mark.parametrize("hook", [read_by_hook, changed_by_hook])
@pytest.mark.parametrize("place", ["conv", "parent"])
def test_hooks_on_a_convolution_keep_it_from_folding(hook, place):
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Sequential(conv(3)), nn.BatchNorm2d(4)))
    (model[0][0] if place == "conv" else model[0]).register_forward_hook(hook)
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    plan = converted(model, example_input=IMAGE, from_pretrained=True)
    assert actions(plan) == {"1": "affine"}
    assert relative_difference(evaluated(model, images), expected) < ROUNDING


@pytest.mark.parametrize("from_pretrained", [False, True])
@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(changed_by_hook),
        lambda m: m.register_forward_pre_hook(lambda module, args: None),
        lambda m: m.register_full_backward_hook(lambda module, inputs, outputs: None),
        lambda m: m.register_full_backward_pre_hook(lambda module, outputs: None),
    ],
)
def test_batch_norm_with_hooks_stays(register, from_pretrained):
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    register(model[1])
    with pytest.warns(UserWarning, match="1 of 1 normalisations stay: '1' .BatchNorm2d: it has"):
        plan = converted(model, example_input=IMAGE, from_pretrained=from_pretrained)
    assert remarks(plan) == {"1": "it has hooks"}
    assert isinstance(model[1], nn.BatchNorm2d)


def padded_with_bias(m, x):
    y = m.norm(m.conv(x))
    return y + m.norm.bias.view(1, -1, 1, 1)


def asked_for_features(m, x):
    return m.norm(m.conv(x)).reshape(-1, m.norm.num_features)


class FrozenNorm(Function):
    def train(self, mode=True):
        super().train(mode)
        self.norm.weight.requires_grad = False
        return self


def test_batch_norm_that_train_reads_stays():
    model = FrozenNorm(lambda m, x: m.norm(m.conv(x)), conv=conv(3), norm=nn.BatchNorm2d(4))
    plan = converted(model, example_input=IMAGE)
    assert remarks(plan) == {"norm": "the forward pass reads its weight elsewhere"}
    model.train()


def read_through_an_alias(m, x):
    return m.norm(m.conv(x)) + m.alias[0].view(1, -1, 1, 1)


@pytest.mark.parametrize("from_pretrained", [False, True])
@pytest.mark.parametrize(
    "function, attribute",
    [
        (padded_with_bias, "bias"),
        (asked_for_features, "num_features"),
        (read_through_an_alias, "tensors"),
    ],
)
def test_batch_norm_that_the_forward_pass_reads_stays(function, attribute, from_pretrained):
    model = Function(function, conv=conv(3), norm=nn.BatchNorm2d(4))
    model.alias = [model.norm.bias]
    kind = type(model.norm)
    plan = converted(model, example_input=IMAGE, from_pretrained=from_pretrained)
    assert remarks(plan) == {"norm": f"the forward pass reads its {attribute} elsewhere"}
    assert type(model.norm) is kind is nn.BatchNorm2d
    evaluated(model, IMAGE)


def test_trained_model_must_say_what_to_keep():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 8, 8))
    twin = copy.deepcopy(model)
    for function in (convert, plan_conversion):
        with pytest.raises(ValueError, match="from_pretrained must be given .* of '1' is not 0"):
            function(model)
    assert same_state(model, twin)
    model[1].running_mean.zero_()
    with pytest.raises(ValueError, match="running_var of '1' is not 1; pass True to keep"):
        convert(model)
    convert(model, from_pretrained=False, gain=0.8)
    # 0.8 to the rounding of a norm of 27 squares.
    torch.testing.assert_close(
        model[0].weight.detach().flatten(1).norm(dim=1), torch.full((4,), 0.8)
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        lambda c: prune.l1_unstructured(c, "weight", 0.5),
        lambda c: prune.random_unstructured(c, "bias", 0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
)
def test_weights_that_hooks_compute(compute):
    torch.manual_seed(0)
    model = randomised(nn.Sequential(conv(3, bias=True), nn.BatchNorm2d(4)))
    compute(model[0])
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    twin = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'0' must be a parameter, but a hook computes it"):
        convert(model, from_pretrained=False)
    assert all(torch.equal(value, twin[key]) for key, value in model.state_dict().items())
    plan = converted(model, from_pretrained=True)
    assert actions(plan) == {"1": "affine"}
    assert relative_difference(evaluated(model, images), expected) < ROUNDING


def test_parametrized_batch_norm_stays():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert remarks(converted(model)) == {"1": "it is parametrized"}


def test_parametrized_convolutions_are_initialised():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    parametrizations.weight_norm(model[0])
    assert actions(converted(model)) == {"1": "removed"}


class InPlaceABN(nn.Module):
    """A normalisation of another library, that keeps statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_mean, self.running_var))


class FRN(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return self.scale * x * x.square().mean((2, 3), keepdim=True).add(1e-6).rsqrt()


class ConvBNReLU(nn.Sequential):
    """No normalisation, but a block whose name says what it holds."""


@pytest.mark.parametrize("kind", [InPlaceABN, FRN])
def test_normalisations_of_other_libraries_are_listed(kind):
    model = ConvBNReLU(conv(3), kind(), nn.ReLU())
    with pytest.warns(UserWarning, match=f"'1' .{kind.__name__}: not a BatchNorm"):
        plan = converted(model, example_input=IMAGE)
    assert remarks(plan) == {"1": "not a BatchNorm of torch or timm"}


@pytest.mark.parametrize(
    "function, operator",
    [
        (lambda m, x: F.batch_norm(m.conv(x), None, None, training=True), "batch_norm"),
        (lambda m, x: F.group_norm(m.conv(x), 2), "native_group_norm"),
        (lambda m, x: F.layer_norm(m.conv(x), (8,)), "native_layer_norm"),
        (lambda m, x: F.instance_norm(m.conv(x)), "batch_norm"),
    ],
)
def test_normalisations_called_as_functions_are_listed(function, operator):
    model = nn.Sequential(Function(function, conv=conv(3)), nn.ReLU())
    (change,) = converted(model, example_input=IMAGE).left
    assert change.name == "0" and operator in change.type
    assert change.remark == "called as a function, not as a module"


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (1, 4, 1, 1), ()])
def test_scale_between_convolution_and_batch_norm(shape):
    model = Function(lambda m, x: m.norm(m.conv(x) * m.s), conv=conv(3), norm=nn.BatchNorm2d(4))
    model.s = nn.Parameter(torch.ones(shape))
    image = torch.zeros(1, 3, 4, 4)
    (change,) = converted(model, example_input=image).changes
    assert change.action == "removed" and change.convolutions == ("conv",)


def test_linear_layer_of_one_output_is_no_scale():
    model = Function(
        lambda m, x: m.norm(m.linear(m.conv(x).mean((2, 3)))),
        conv=conv(3),
        linear=nn.Linear(4, 1),
        norm=nn.BatchNorm1d(1),
    )
    plan = converted(model, example_input=IMAGE)
    assert remarks(plan) == {"norm": "its input comes from 'linear', a Linear"}


class FullyShardedDataParallel(nn.Sequential):
    """A stand-in for torch's, which needs a process group."""


REFUSED = {
    "compiled": (torch.compile, "compiled; call torch.compile.convert.model.. instead"),
    "inner": (lambda m: nn.Sequential(torch.compile(m)), "its module '0' is compiled"),
    "scripted": (torch.jit.script, "scripted or traced"),
    "traced": (lambda m: nn.Sequential(torch.jit.trace(m, IMAGE)), "'0' is scripted or traced"),
    "wrapped": (nn.DataParallel, r"wrapped; call DataParallel\(convert\(model\)\)"),
    "sharded": (FullyShardedDataParallel, "sharded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_converted_any_more(case):
    wrap, message = REFUSED[case]
    inner = nn.Sequential(conv(3), nn.BatchNorm2d(4)).eval()
    model, twin = wrap(inner), copy.deepcopy(inner)
    for function in (convert, plan_conversion):
        with pytest.raises(ValueError, match=message):
            function(model, example_input=IMAGE)
    assert same_state(inner, twin)


def test_model_compiled_in_place_is_refused():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    model.compile()
    with pytest.raises(ValueError, match=r"before model.compile\(\)"):
        convert(model)


def test_sharded_model_is_refused(fully_shard):
    model = fully_shard(nn.Sequential(conv(3), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="model must not be sharded yet, but it is"):
        convert(model)


def test_what_is_no_module_is_refused():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, but was of type tuple"):
        convert((model, None))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: FusedCZMSGD(czm_param_groups(m), lr=0.1),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        czm_param_groups,
    ],
)
def test_optimizer_made_before_is_warned_about(make):
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    early = make(model)
    with pytest.warns(UserWarning, match=f"{type(early).__name__}.* made before convert will not"):
        convert(model, gain=0.8)


def test_optimizer_that_lacks_nothing_is_not_warned_about():
    model = nn.Sequential(conv(3, bias=True), nn.BatchNorm2d(4))
    other = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    early = FusedCZMSGD(czm_param_groups(model), lr=0.1)
    gone = torch.optim.SGD(other.parameters(), lr=0.1)
    gone.itself = gone
    gc.disable()
    try:
        del gone
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(model, gain=0.8)
            convert(other, gain=0.8)
    finally:
        gc.enable()
    assert early.param_groups


def batch(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


BAD_EXAMPLES = {
    "channels": (batch(16, 5, 8, 8), "model must run on example_input in eval mode"),
    "dtype": (batch(16, 3, 8, 8).double(), "example_input|dtype"),
    "one image": (batch(1, 3, 8, 8), "must be a batch"),
    "constant": (torch.ones(16, 3, 8, 8), "is constant"),
    "not finite": (batch(16, 3, 8, 8).log(), "must be finite"),
    "no tensor": ("image", "model must run on example_input"),
}


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_bad_examples_change_nothing(case):
    example, message = BAD_EXAMPLES[case]
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv()).train()
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        convert(model, example_input=example)
    assert same_state(model, twin) and model.training
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert model[0].bias is None and not hasattr(model[0], "stem")


def spread(x):
    return x.transpose(0, 1).flatten(1).var(dim=1, correction=0).mean().sqrt().item()


@pytest.mark.parametrize("given", [True, False])
def test_start_is_measured_unless_a_gain_is_given(given):
    torch.manual_seed(0)
    images = batch(32, 3, 16, 16)
    layers = [conv(3, 16), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(11):
        layers += [conv(16, 16), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers)
    twin = copy.deepcopy(model)
    convert(twin, gain=0.8)
    # Every layer at gain 0.8 shrinks the signal by more than a third.
    assert spread(evaluated(twin, images)) < 0.01
    convert(model, example_input=images if given else None)
    # The last convolution has spread 1, the ReLU behind it leaves 0.58 of a normal distribution.
    assert 0.2 < spread(evaluated(model, images)) < 2


def test_noise_takes_the_place_of_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.GroupNorm(2, 4))
    convert(model, example_input=IMAGE, gain=0.8, noise=0.25)
    noise = model[1]
    assert isinstance(noise, ChannelNoise) and noise.amplitude == 0.25
    assert isinstance(model[4], nn.GroupNorm)
    ones = torch.ones(512, 4, 3, 3)
    u = noise.train()(ones)
    assert torch.equal(u, u[:, :, :1, :1].expand_as(u))
    factors = u[:, :, 0, 0]
    assert 0.75 <= factors.min() < 0.76 and 1.24 < factors.max() <= 1.25
    # 2048 draws of standard deviation 0.144: the mean is within 5 * 0.144 / sqrt(2048).
    assert abs(factors.mean().item() - 1) < 0.016
    assert noise.eval()(ones) is ones


@pytest.mark.parametrize("training", [True, False])
def test_noise_shields_its_input_from_changes_in_place(training):
    def function(m, x):
        x = m.conv(x)
        return x + m.relu(m.norm(x))

    modules = {"conv": conv(3), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True)}
    model = Function(function, **modules)
    convert(model, example_input=IMAGE, gain=0.8, noise=0.1)
    images = torch.randn(2, 3, 8, 8)
    y = model.conv(images)
    torch.manual_seed(1)
    result = model.train(training)(images)
    torch.manual_seed(1)
    torch.testing.assert_close(result, y + F.relu(model.norm(y)), rtol=0, atol=0)


@pytest.mark.parametrize("from_pretrained", [True, False])
@pytest.mark.parametrize(
    "hide", [lambda norm: [norm], lambda norm: lambda: norm, lambda norm: {0: norm}]
)
def test_batch_norm_reached_past_its_parent_is_refused(hide, from_pretrained):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.hidden = hide(self.norm)

        def forward(self, x):
            norm = self.hidden() if callable(self.hidden) else self.hidden[0]
            return norm(self.conv(x))

    model = Hiding()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="must reach its BatchNorm 'norm' as a child of a module"):
        convert(model, from_pretrained=from_pretrained)
    assert type(model.norm) is nn.BatchNorm2d
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
