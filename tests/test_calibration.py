"""calibrate_: spreads and means of every convolution's output, whatever the graph."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from czm_fused import CZMBasicBlock, czm_init_, exp_scale
from czm_fused.calibration import calibrate_


def _batch(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) + 0.3).to(dtype)


def _channels(x):
    return x.double().transpose(0, 1).flatten(1)


def _outputs(model, *args, train=False):
    """Return the output of every convolution by name, at its first run."""
    outputs = {}

    def keep(name):
        def hook(_, __, output):
            outputs.setdefault(name, output.detach().clone())

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    with torch.no_grad():
        model.train(train)(*args)
    for hook in hooks:
        hook.remove()
    return outputs


def _check(model, example, targets=None, tolerance=1e-4):
    for name, output in _outputs(model, example).items():
        channels = _channels(output)
        spread = channels.var(dim=1, correction=0).mean().sqrt().item()
        assert spread == pytest.approx((targets or {}).get(name, 1.0), rel=tolerance), name
        if model.get_submodule(name).bias is not None:
            assert channels.mean(dim=1).abs().max() < tolerance, name


class Residual(nn.Module):
    """A stem, a unit with a projection, a unit with a gate, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.projection = nn.Conv2d(8, 12, 1, stride=2)
        self.expand = nn.Conv2d(12, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze = nn.Conv2d(24, 24, 1)
        self.project = nn.Conv2d(24, 12, 1)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        branch = self.conv2(F.relu(self.conv1(x)))
        branch += self.projection(x)
        x = F.relu(branch)
        y = F.relu6(self.depthwise(F.silu(self.expand(x))))
        y = self.project(y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True))))
        x = x + self.dropout(y)
        return self.classifier(x.mean((2, 3)))


class Branches(nn.Module):
    """A concatenation of grouped convolutions, one of which runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.Conv2d(24, 6, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        y = F.relu(self.second(x))
        return self.third(torch.cat([x, y, self.second(y)], dim=1)).mean((2, 3))


@pytest.mark.parametrize("seed", [0, 1])
def test_calibrate_sets_spread_and_mean_of_every_output(seed):
    torch.manual_seed(seed)
    model = czm_init_(Residual(), stem="stem")
    example = _batch(16, 3, 8, 8)
    calibrate_(model, example, target=1.5, branch=0.2)
    targets = dict.fromkeys(_outputs(model, example), 1.5)
    targets["conv2"] = targets["project"] = 1.5 * 0.2
    _check(model, example, targets)


def test_calibrate_multiplies_all_filters_of_a_layer_by_one_factor():
    model = czm_init_(Residual())
    before = copy.deepcopy(model)
    calibrate_(model, _batch(16, 3, 8, 8))
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if new.dim() == 4:
            ratios = new / old
            torch.testing.assert_close(ratios, ratios.flatten()[0].expand_as(ratios), msg=name)
        elif name.startswith("classifier"):
            assert torch.equal(new, old)


def test_calibrate_follows_concatenations_groups_and_shared_modules():
    model = Branches()
    example = _batch(16, 4, 8, 8)
    report = calibrate_(model, example)
    assert [layer.name for layer in report.layers] == ["first", "second", "third"]
    assert all(layer.remark == "" for layer in report.layers)
    _check(model, example)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_calibrate_takes_one_to_three_dimensions(dimensions):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    model = nn.Sequential(conv(2, 6, 3), nn.ReLU(), conv(6, 4, 3, bias=False))
    example = _batch(16, 2, *[9] * dimensions)
    calibrate_(model, example)
    _check(model, example)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_calibrate_keeps_the_dtype(dtype, tolerance):
    model = czm_init_(Branches().to(dtype))
    example = _batch(16, 4, 8, 8, dtype=dtype)
    calibrate_(model, example)
    assert {p.dtype for p in model.parameters()} == {dtype}
    _check(model, example, tolerance=tolerance)


def test_calibrate_finds_the_branches_of_czm_units():
    units = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        CZMBasicBlock(8, 8, amplitude=0.1),
        CZMBasicBlock(8, 16, stride=2),
    )
    report = calibrate_(units, _batch(16, 3, 8, 8), branch=0.25)
    branches = {layer.name: layer.after for layer in report.layers if layer.remark == "branch"}
    assert branches == {"2.conv2": 0.25, "3.conv2": 0.25}


class TakesList(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(torch.stack(images))


def test_calibrate_finds_the_branches_of_models_that_take_lists():
    model = TakesList(Residual())
    report = calibrate_(model, (list(_batch(16, 3, 8, 8)),))
    branches = {layer.name for layer in report.layers if layer.remark == "branch"}
    assert branches == {"network.conv2", "network.project"}
    assert report.notes == ()


def test_calibrate_says_where_it_cannot_look_for_branches():
    class WithoutGradients(Residual):
        def forward(self, x):
            assert not torch.is_grad_enabled(), "for inference alone"
            return super().forward(x)

    report = calibrate_(WithoutGradients(), _batch(16, 3, 8, 8))
    assert not any(layer.remark for layer in report.layers)
    assert re.search(r"residual branches were not .* \(AssertionError: for inference", str(report))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_calibrate_takes_tensors_tuples_and_dictionaries(wrap):
    model = Branches()
    example = _batch(16, 4, 8, 8)
    calibrate_(model, wrap(example))
    _check(model, example)


def test_calibrate_center_false_keeps_the_biases():
    model = Branches()
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    calibrate_(model, _batch(16, 4, 8, 8), center=False)
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())


def test_calibrate_sets_the_parameters_of_exp_scale():
    torch.manual_seed(0)
    model = Branches()
    exp_scale(model.second)
    directions = model.second.parametrizations.weight.original0.clone()
    example = _batch(16, 4, 8, 8)
    calibrate_(model, example)
    _check(model, example)
    unit = directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(model.second.parametrizations.weight.original0.data, unit.data)


def test_calibrate_sets_a_shared_weight_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    example = _batch(16, 4, 9, 9)
    report = calibrate_(model, example)
    assert report.layers[1].remark == "shares the weight of '0'"
    output = _channels(_outputs(model, example)["0"])
    assert output.var(dim=1, correction=0).mean().item() == pytest.approx(1, rel=1e-4)


class AuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3)
        self.auxiliary = nn.Conv2d(8, 4, 1)
        self.never = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.relu(self.trunk(x))
        return (x.mean((2, 3)), self.auxiliary(x)) if self.training else x.mean((2, 3))


def test_calibrate_measures_what_runs_in_training_mode_alone():
    model = AuxiliaryHead()
    example = _batch(16, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"never ran.*: never; pass an example_input"):
        report = calibrate_(model, example)
    assert [layer.name for layer in report.layers] == ["trunk", "auxiliary", "never"]
    spread = _channels(_outputs(model, example, train=True)["auxiliary"]).var(dim=1, correction=0)
    assert spread.mean().item() == pytest.approx(1, rel=1e-4)
    assert report.layers[2].remark == "never ran" and math.isnan(report.layers[2].before)


def test_calibrate_leaves_modes_buffers_gradients_and_generators():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3))
    model[2].eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    calibrate_(model, _batch(16, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_calibrate_without_example_input_measures_on_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    twin = copy.deepcopy(model)
    report = calibrate_(model)
    assert "measured on noise, 32x5x64x64" in str(report)
    assert report.output_after == pytest.approx(1, rel=1e-4)
    calibrate_(twin)
    assert torch.equal(model[2].weight, twin[2].weight)
    calibrate_(twin, seed=1)
    assert not torch.equal(model[2].weight, twin[2].weight)


def test_calibrate_noise_takes_a_size_that_the_model_takes():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 28 * 28, 4))
    assert "32x1x28x28" in str(calibrate_(model))


def test_calibrate_warns_of_a_dead_output():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    nn.init.constant_(model[3].weight, 1e-6)
    with pytest.warns(UserWarning, match="starts dead"):
        calibrate_(model, _batch(16, 3, 8, 8))
    nn.init.constant_(model[3].weight, 1e6)
    with pytest.warns(UserWarning, match="starts exploded"):
        calibrate_(model, _batch(16, 3, 8, 8))


def test_calibrate_warns_of_a_constant_output():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.uniform_(model[0].bias)
    weight = model[2].weight.clone()
    with pytest.warns(UserWarning, match=r"constant output\): 0, 2; pass a batch"):
        report = calibrate_(model, _batch(16, 3, 8, 8))
    assert [layer.remark for layer in report.layers] == ["constant output"] * 2
    assert torch.equal(model[2].weight, weight)


def test_calibrate_warns_of_a_weight_computed_by_a_hook():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    with pytest.warns(UserWarning, match=r"computed by a hook\): 0; remove the hook"):
        calibrate_(model, _batch(16, 3, 8, 8))


def test_report_prints_a_table_and_html():
    report = calibrate_(czm_init_(Residual()), _batch(16, 3, 8, 8))
    table = str(report)
    assert re.search(r"^layer +gain +spread before +after +remark$", table, re.M)
    assert re.search(r"^conv2 .* 0.5 +branch$", table, re.M)
    assert f"{report.output_before:.3g}" in table and f"{report.output_after:.3g}" in table
    html = report._repr_html_()
    assert html.count("<tr>") == len(report.layers) + 2 and "<td>conv2</td>" in html


def _fails_late(model):
    model.classifier = nn.Linear(13, 4)
    return model


@pytest.mark.parametrize(
    ("change", "example", "message"),
    [
        (None, torch.randn(1, 3, 8, 8), "must be a batch, but was one sample"),
        (None, torch.zeros(16, 3, 8, 8), "must vary from sample to sample, but is constant"),
        (None, torch.full((16, 3, 8, 8), math.nan), "must be finite"),
        (None, torch.randn(16, 3, 8, 8).double(), r"dtype, torch.float32, but had torch.float64"),
        (None, torch.empty(16, 3, 8, 8, device="meta"), "must be on the model's device, cpu"),
        (None, torch.randn(16, 4, 8, 8), r"but the model raised RuntimeError: .*channels"),
        (None, "images", "must be a tensor, or a tuple or dictionary with one, but was str"),
        (_fails_late, torch.randn(16, 3, 8, 8), "the model raised RuntimeError"),
    ],
)
def test_calibrate_names_bad_input_and_leaves_the_model(change, example, message):
    model = nn.Sequential(Residual(), nn.BatchNorm1d(4))
    if change:
        change(model[0])
    model.train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        calibrate_(model, example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_calibrate_undoes_what_it_set_when_the_pass_fails():
    class FailsOnThirdRun(nn.Module):
        runs = 0

        def forward(self, x):
            self.runs += 1
            if self.runs == 3:
                raise RuntimeError("third run")
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), FailsOnThirdRun())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="third run"):
        calibrate_(model, _batch(16, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class CalledByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.convolution(input=x)


def test_calibrate_reads_an_input_given_by_keyword():
    called, plain = CalledByKeyword(), nn.Conv2d(3, 4, 3, padding=1)
    plain.load_state_dict(called.convolution.state_dict())
    for model in (called, plain):
        calibrate_(model, _batch(16, 3, 8, 8), weigh_taps=True)
    assert torch.equal(called.convolution.weight, plain.weight)
    assert torch.equal(called.convolution.bias, plain.bias)


def test_calibrate_leaves_biases_that_modules_share():
    first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    second.bias = first.bias
    model, bias = nn.Sequential(first, nn.ReLU(), second), first.bias.detach().clone()
    example = _batch(16, 3, 8, 8)
    calibrate_(model, example)
    assert torch.equal(first.bias, bias)
    for output in _outputs(model, example).values():
        spread = _channels(output).var(dim=1, correction=0).mean().sqrt().item()
        assert spread == pytest.approx(1, rel=1e-4)


def test_calibrate_refuses_sharded_models(fully_shard):
    model = fully_shard(nn.Sequential(nn.Conv2d(3, 4, 3)))
    for _ in range(2):
        with pytest.raises(ValueError, match="model must not be sharded yet, but it is"):
            calibrate_(model, _batch(16, 3, 8, 8))
        # After a pass without backward, the parameters are plain tensors.
        model(_batch(16, 3, 8, 8))


def test_calibrate_needs_convolutions_that_run():
    with pytest.raises(ValueError, match="must have a convolution, but had none"):
        calibrate_(nn.Linear(3, 2), torch.randn(16, 3))
    with pytest.raises(ValueError, match="must reach a convolution of the model, but none ran"):
        model = nn.Module()
        model.convolution = nn.Conv2d(3, 2, 1)
        model.forward = lambda x: x
        calibrate_(model, torch.randn(16, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "value"), [("target", 0.0), ("branch", -1.0), ("target", math.nan)]
)
def test_calibrate_checks_its_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        calibrate_(Branches(), _batch(16, 4, 8, 8), **{name: value})


@pytest.mark.parametrize(
    ("only", "error", "message"),
    [
        ("conv11", TypeError, r"only must be a collection of names, but was 'conv11'; write \['co"),
        (["conv1", "conv11"], ValueError, r"named 'conv11' \(the nearest is 'conv1'\)$"),
        ([], ValueError, "only must name a convolution of the model, but was empty; None sets all"),
    ],
)
def test_calibrate_refuses_what_names_no_convolution(only, error, message):
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        calibrate_(model, _batch(16, 3, 8, 8), only=only)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_calibrate_without_example_input_says_why_noise_does_not_do():
    class TakesText(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.convolution = nn.Conv1d(4, 4, 3)

        def forward(self, tokens):
            return self.convolution(self.embedding(tokens).transpose(1, 2))

    model = TakesText()
    with pytest.raises(ValueError, match="example_input must be given, as the model does not run"):
        calibrate_(model)
    tokens = torch.randint(10, (16, 12), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_(model, tokens)
    _check(model, tokens)


def test_a_measured_start_weighs_taps_by_their_coverage():
    def network():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1)
        )

    images = _batch(32, 3, 2, 2)
    model = czm_init_(network(), example_input=images, generator=torch.Generator().manual_seed(0))
    unweighted = czm_init_(
        network(), gain=1.0, zero_mean=False, generator=torch.Generator().manual_seed(0)
    )
    _check(model, images)
    for index, coverage in ((0, torch.tensor([0.5, 1.0, 0.5])), (3, torch.tensor([0.0, 1.0, 0.0]))):
        expected = unweighted[index].weight * coverage[:, None] * coverage
        factor = model[index].weight.norm() / expected.norm()
        # Three products and a norm: below 16 eps.
        torch.testing.assert_close(model[index].weight, factor * expected, rtol=2e-6, atol=1e-7)

    before = copy.deepcopy(model)
    calibrate_(model, images)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=1e-5, atol=1e-5)

    for groups, unmet in ((1, 3 * 3 * 8), (3, 0)):
        convolution = nn.Conv2d(3, 3, 3, padding=1, groups=groups)
        czm_init_(convolution, example_input=images[..., :1, :1])
        assert (convolution.weight == 0).sum() == unmet


def test_a_measured_start_with_zero_mean_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))
    czm_init_(model, example_input=_batch(32, 3, 2, 2), zero_mean=True)
    # 9 taps of a norm of some units.
    assert model[2].weight.mean(dim=(2, 3)).abs().max() < 1e-6
