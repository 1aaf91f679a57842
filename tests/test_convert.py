"""convert: BatchNorm goes, CZM comes, and what cannot be converted stays and is listed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from czm_fused import FusedCZMSGD, convert, czm_param_groups, plan_conversion
from czm_fused.nn import ChannelAffine, Copy, CZMConv2d, exp_scale
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

MODES = pytest.mark.parametrize("from_pretrained", [False, True], ids=["scratch", "pretrained"])


def test_pretrained_network_goes_on_training():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv()))
    convert(model, from_pretrained=True)
    folded = model[0].weight.detach().clone()
    optimizer = FusedCZMSGD(czm_param_groups(model), lr=0.0, momentum=0.9)
    losses = []
    for lr in (0.0, 0.01, 0.01, 0.01):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3, 8, 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if lr == 0:
            scales = optimizer.state[model[0].weight]["log_scale"].exp()
            torch.testing.assert_close(scales, folded.flatten(1).norm(dim=1))
            torch.testing.assert_close(model[0].weight.detach(), folded)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[1]


@pytest.mark.parametrize("example_input", [IMAGE, None], ids=["example", "zeros"])
@MODES
def test_plan_conversion_changes_nothing(example_input, from_pretrained):
    model = randomised(
        nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.Dropout(), nn.GroupNorm(2, 4), conv())
    )
    model[2].eval()
    twin = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    versions = [tensor._version for tensor in model.state_dict().values()]
    modules = list(model.modules())
    options = {"example_input": example_input, "from_pretrained": from_pretrained}
    plan = plan_conversion(model, **options)

    assert list(map(type, model.modules())) == list(map(type, twin.modules()))
    assert list(model.modules()) == modules
    assert [module.training for module in modules] == [m.training for m in twin.modules()]
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert versions == [tensor._version for tensor in model.state_dict().values()]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(hasattr(module, "stem") for module in modules)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)

    table = str(plan).splitlines()
    action = "folded" if from_pretrained else "removed"
    assert table[0].split() == ["normalisation", "type", "action", "convolutions", "remark"]
    assert table[1].split() == ["1", "BatchNorm2d", action, "0", "(+", "bias)"]
    assert table[2].split()[:6] == ["3", "GroupNorm", "left", "not", "a", "BatchNorm"]
    assert "1 convolutions gain a bias" in table[-1]


def test_plan_shows_as_html():
    plan = plan_conversion(nn.Sequential(conv(3), nn.BatchNorm2d(4)))
    html = plan._repr_html_()
    assert "<td>BatchNorm2d</td><td>removed</td><td>0 (+ bias)</td>" in html
    assert html.startswith("<table><thead><tr><th>normalisation</th>")
    assert "<p>stem: &#x27;0&#x27; (the first to run)</p>" in html


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Idle(nn.BatchNorm2d):
    """A BatchNorm with another name and nothing else."""


UNKNOWN = {
    "own": (lambda m, x: m.norm(m.conv(x)), OwnForward(4), "a subclass of BatchNorm"),
    "image": (lambda m, x: m.conv(m.norm(x)), nn.BatchNorm2d(3), "from no convolution"),
    "unused": (lambda m, x: m.conv(x), nn.BatchNorm2d(4), "did not run"),
    "linear": (
        lambda m, x: m.norm(m.linear(m.conv(x).mean((2, 3)))),
        nn.BatchNorm1d(5),
        "'linear', a Linear",
    ),
    "transposed": (lambda m, x: m.norm(m.up(m.conv(x))), nn.BatchNorm2d(4), "a ConvTranspose2d"),
    "weight": (
        lambda m, x: m.norm(m.conv(x) * m.table),
        nn.BatchNorm2d(4),
        "a weight of the model itself",
    ),
    "mixed": (
        lambda m, x: m.norm(torch.cat([m.conv(x), m.up(m.conv(x))], 1)),
        nn.BatchNorm2d(8),
        "'up', a ConvTranspose2d",
    ),
    "layer": (lambda m, x: m.norm(m.conv(x)), nn.LayerNorm(8), "not a BatchNorm"),
    "instance": (lambda m, x: m.norm(m.conv(x)), nn.InstanceNorm2d(4), "not a BatchNorm"),
    "local": (lambda m, x: m.norm(m.conv(x)), nn.LocalResponseNorm(2), "not a BatchNorm"),
}


@MODES
@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_stays_and_is_listed(case, from_pretrained):
    function, norm, why = UNKNOWN[case]
    norm = copy.deepcopy(norm)
    model = Function(
        function,
        conv=conv(3),
        up=nn.ConvTranspose2d(4, 4, 3, padding=1),
        linear=nn.Linear(4, 5),
        norm=norm,
    )
    model.table = nn.Parameter(torch.ones(8, 8))
    plan = converted(model, example_input=IMAGE, from_pretrained=from_pretrained)
    assert model.norm is norm
    assert [change.name for change in plan.left] == ["norm"]
    assert why in plan.left[0].remark
    assert model.conv.bias is None
    assert f"norm  {' ' * 9}{type(norm).__name__}" in str(plan)


@MODES
@pytest.mark.parametrize(
    "convolution, norm, shape",
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 8)),
        (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4, eps=0.1), (2, 3, 4, 4, 4)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.SyncBatchNorm(4), (2, 3, 8, 8)),
        (nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False), (2, 3, 8, 8)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), Idle(4), (2, 3, 8, 8)),
        (CZMConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=None), (2, 3, 8, 8)),
    ],
)
def test_any_convolution_and_batch_norm(convolution, norm, shape, from_pretrained):
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Sequential(copy.deepcopy(convolution), norm), nn.ReLU()))
    model = copy.deepcopy(model).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    expected = evaluated(model, inputs)
    plan = converted(model, example_input=inputs, from_pretrained=from_pretrained)
    assert actions(plan) == {"0.1": "folded" if from_pretrained else "removed"}
    assert isinstance(model[0][1], nn.Identity)
    assert model[0][0].bias.dtype == torch.float64
    if from_pretrained:
        # A few operations on numbers about 1: some 1e-15.
        assert relative_difference(evaluated(model, inputs), expected) < 1e-13


NOT_FOLDED = {
    "two norms": (lambda m, x: m.norm1(y := m.conv(x)) + m.norm2(y), "feeds norm2"),
    "shared": (lambda m, x: m.norm1(m.conv(x)) + m.norm2(m.conv(x + 1)), "feeds norm2"),
    "other reader": (lambda m, x: m.norm1(y := m.conv(x)) + m.norm2(y + 1), "feeds add"),
    "own output": (lambda m, x: m.norm2(m.conv(y := m.conv(x))) + m.norm1(y), "feeds"),
    "activation": (lambda m, x: m.norm2(F.relu(m.norm1(F.relu(m.conv(x))))), "directly"),
    "in place": (lambda m, x: m.norm1(m.conv(x).relu_()) + m.norm2(m.conv2(x)), "directly"),
    "sum": (lambda m, x: m.norm1(m.conv(x) + x) + m.norm2(m.conv2(x)), "directly"),
    "tied": (lambda m, x: m.norm2(m.conv2(m.norm1(m.conv(x)))), "are shared"),
    "functional": (
        lambda m, x: m.norm2(m.conv2(m.norm1(m.conv(x)))) + F.conv2d(x, m.conv.weight, padding=1),
        "are shared",
    ),
}


@MODES
@pytest.mark.parametrize("case", NOT_FOLDED)
def test_what_cannot_be_folded_becomes_an_affine(case, from_pretrained):
    torch.manual_seed(0)
    function, why = NOT_FOLDED[case]
    norms = {"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(4)}
    model = Function(
        lambda m, x: function(m, m.stem(x)), stem=conv(3), conv=conv(), conv2=conv(), **norms
    )
    if case == "tied":
        model.conv2.weight = model.conv.weight
    randomised(model)
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    plan = converted(model, example_input=IMAGE, from_pretrained=from_pretrained)
    if from_pretrained:
        assert "affine" in actions(plan).values()
        assert any(why in remark for remark in remarks(plan).values() if remark)
        # Seven operators on numbers about 1, in float32: below 100 * 2^-24 = 6e-6.
        assert relative_difference(evaluated(model, images), expected) < 6e-6
        assert any(isinstance(module, ChannelAffine) for module in model.modules())
    else:
        assert set(actions(plan).values()) == {"removed"}
        assert model.conv.bias is not None
    output = model.train()(images)
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def residual(m, x):
    x = m.conv(x)
    return x + m.relu(m.norm(x))


def view(m, x):
    x = m.conv(x)
    part = x[:, :4]
    part += 1
    return x + torch.cat([m.relu(m.norm(part)), part], 1)


def view_of_the_result(m, x):
    x = m.conv(x)
    result = m.norm(x)
    m.relu(result[:, :2])
    return x + result


def fresh(m, x):
    x = m.conv(x)
    x += 1
    return m.relu(m.norm(x))


@pytest.mark.parametrize(
    "function, inplace, copies",
    [
        (residual, True, True),
        (residual, False, False),
        (view, True, True),
        (view_of_the_result, True, True),
        (fresh, True, False),
    ],
)
def test_batch_norm_shields_its_input_from_changes_in_place(function, inplace, copies):
    outputs = 8 if function is view else 4
    modules = {"conv": conv(3, outputs), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace)}
    model = Function(function, **modules)
    plan = converted(model, example_input=IMAGE)
    assert ("copy" in remarks(plan)["norm"]) == copies
    twin = copy.deepcopy(model)
    twin.norm, twin.relu = Copy(), nn.ReLU(inplace)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(images), twin(images), rtol=0, atol=0)
    model(images).sum().backward()
    twin(images).sum().backward()
    torch.testing.assert_close(model.conv.weight.grad, twin.conv.weight.grad, rtol=0, atol=0)


def test_modules_under_several_names_are_converted_once():
    block = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(conv(3), block, nn.Sequential(block), nn.ModuleDict({"a": block})["a"])
    plan = converted(model, example_input=IMAGE)
    assert actions(plan) == {"1.1": "removed"}
    assert isinstance(block[1], nn.Identity) and block[0].bias is not None
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())


def test_shared_block_is_folded():
    torch.manual_seed(0)
    block = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    model = randomised(nn.Sequential(conv(3), block, block))
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    plan = converted(model, example_input=IMAGE, from_pretrained=True)
    assert actions(plan) == {"1.1": "folded"}
    # As above: below 100 * 2^-24.
    assert relative_difference(evaluated(model, images), expected) < 6e-6


def test_output_of_the_model_is_not_folded():
    def function(m, x):
        features = m.conv(x)
        return {"features": features, "logits": m.norm(features)}

    model = Function(function, conv=conv(3), norm=nn.BatchNorm2d(4))
    plan = converted(model, example_input=IMAGE, from_pretrained=True)
    assert actions(plan) == {"norm": "affine"}
    assert "the output of the model" in remarks(plan)["norm"]


def test_heads_that_run_in_training_alone_are_converted():
    def function(m, x):
        x = m.conv(x)
        return m.norm(m.head(x)) if m.training else x

    model = Function(function, conv=conv(3), head=conv(), norm=nn.BatchNorm2d(4)).eval()
    assert actions(converted(model, example_input=IMAGE)) == {"norm": "removed"}
    assert not model.training


def test_buffers_that_the_pass_changes_are_restored():
    def function(m, x):
        m.count = m.count + 1
        m.total.add_(x.sum() + 1)
        m.features = x
        return m.norm(m.conv(x))

    model = Function(function, conv=conv(3), norm=nn.BatchNorm2d(4))
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("total", torch.zeros(()))
    buffers = dict(model.named_buffers())
    plan_conversion(model, example_input=IMAGE)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model.count == model.total == 0 and not hasattr(model, "features")


def test_failure_in_training_mode_is_noted():
    def function(m, x):
        if m.training:
            raise RuntimeError("needs targets")
        return m.norm(m.conv(x))

    model = Function(function, conv=conv(3), norm=nn.BatchNorm2d(4))
    plan = converted(model, example_input=IMAGE)
    assert actions(plan) == {"norm": "removed"}
    assert "needs targets" in str(plan)


def test_model_that_does_not_run_on_zeros_needs_an_example():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 2))
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="example_input must be given, as .* on zeros of 3 channe"):
        convert(model)
    assert torch.equal(model[0].weight, weight)
    assert actions(converted(model, example_input=IMAGE)) == {"1": "removed"}


@pytest.mark.parametrize(
    "example_input", [(IMAGE, 2.0), {"x": IMAGE, "scale": 2.0}, {"x": IMAGE}, None]
)
def test_arguments_of_any_kind(example_input):
    class Scaled(nn.Sequential):
        def forward(self, x, scale=None):
            return super().forward(x if scale is None else x * scale)

    model = Scaled(conv(3), nn.BatchNorm2d(4))
    assert actions(converted(model, example_input=example_input)) == {"1": "removed"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stem": "nowhere"}, "stem must name a convolution"),
        ({"stem": nn.Conv2d(3, 4, 3)}, "stem must be a convolution"),
        ({"gain": 0.0}, "gain must be a positive number"),
        ({"gain": float("nan")}, "gain must be a positive number"),
        ({"gain": 0.8, "from_pretrained": True}, "gain must be None with from_pretrained"),
        ({"zero_mean": False, "from_pretrained": True}, "zero_mean must be None with from_pre"),
        ({"target": 0.0}, "target must be a positive number"),
        ({"target": 0.3, "gain": 0.8}, "target must be None with gain"),
        ({"target": 0.3, "from_pretrained": True}, "target must be None with from_pretrained"),
        ({"noise": 1.0}, r"noise must be in \[0, 1\)"),
        ({"noise": -0.1}, r"noise must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert model[0].bias is None and isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    "affine, what", [(True, "parameter '1.weight'"), (False, "buffer '1.running_mean'")]
)
def test_lazy_modules_must_be_initialised(affine, what):
    with pytest.raises(ValueError, match=f"the {what} of a lazy module has no shape yet; run a f"):
        convert(nn.Sequential(conv(3), nn.LazyBatchNorm2d(affine=affine)), example_input=IMAGE)


def test_example_that_fails_changes_nothing():
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), conv(3))).train()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="model must run on example_input in eval mode, but raise"):
        convert(model, example_input=torch.zeros(1, 5, 8, 8), from_pretrained=False)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parametrized_convolutions_are_not_folded():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(exp_scale(conv(3)), nn.BatchNorm2d(4)))
    images = torch.randn(2, 3, 8, 8)
    expected = evaluated(model, images)
    plan = converted(model, example_input=IMAGE, from_pretrained=True)
    assert actions(plan) == {"1": "affine"}
    # As above: below 100 * 2^-24.
    assert relative_difference(evaluated(model, images), expected) < 6e-6


def test_half_weights_with_float32_batch_norm():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU()))
    model[0].bfloat16()
    images = torch.randn(2, 3, 8, 8).bfloat16()
    expected = evaluated(model, images)
    convert(model, from_pretrained=True)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    # Weights and outputs are rounded to 8 bits: a few times 2^-9.
    assert relative_difference(evaluated(model, images), expected) < 4 * 2**-9


def test_batch_norm_without_statistics_cannot_be_kept():
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4, track_running_stats=False))
    plan = converted(model, example_input=IMAGE, from_pretrained=True)
    assert remarks(plan) == {"1": "it keeps no running statistics"}
    assert actions(converted(model, example_input=IMAGE)) == {"1": "removed"}


def test_frozen_parameters_stay_frozen():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4))
    model.requires_grad_(False)
    convert(model, from_pretrained=True)
    assert isinstance(model[2], ChannelAffine)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 2, 2)])
def test_channel_affine(shape, dtype):
    weight, bias = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 2.0])
    x = torch.randint(-8, 8, shape).to(dtype)
    expected = torch.stack([x[:, 0], 2 * x[:, 1] + 1, 2 - x[:, 2]], dim=1)
    result = ChannelAffine(weight, bias)(x)
    assert result.dtype == dtype and torch.equal(result, expected)


def test_model_without_normalisation():
    model = nn.Sequential(conv(3), nn.ReLU())
    plan = converted(model)
    assert plan.changes == () and "no normalisation was found" in str(plan)
