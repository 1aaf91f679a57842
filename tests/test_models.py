import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from czm_fused.models import NOISE_ON, blocks_per_stage, cifar_resnet
from czm_fused.nn import CZMConv2d

NORMS = ("czm", "bn", "none")


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (110, "1.7")])
def test_cifar_resnet_has_the_published_number_of_parameters(depth, millions, norm):
    # He et al., table 6.
    count = sum(p.numel() for p in cifar_resnet(depth, norm).parameters())
    digits = len(millions.split(".")[1])
    assert f"{count / 1e6:.{digits}f}" == millions


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_cifar_resnet_depth_counts_the_layers_with_weights(depth):
    model = cifar_resnet(depth)
    assert len(convolutions(model)) + 1 == depth
    assert len(model.units) == 3 * blocks_per_stage(depth)


@pytest.mark.parametrize(
    ("depth", "nearest"), [(-4, 8), (0, 8), (2, 8), (10, 8), (12, 14), (21, 20), (111, 110)]
)
def test_cifar_resnet_names_the_nearest_valid_depth(depth, nearest):
    with pytest.raises(ValueError, match=rf"depth.*{depth}.*nearest is {nearest}$"):
        cifar_resnet(depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "gn"}, "norm must be one of czm, bn, none"),
        ({"noise": 1.0}, "noise must be in"),
        ({"noise": -0.1}, "noise must be in"),
        ({"noise": math.nan}, "noise must be in"),
        ({"norm": "bn", "residual_bias": True}, "residual_bias"),
        ({"noise_on": "stem"}, "noise_on must be one of unit, branch, but was 'stem'"),
    ],
)
def test_cifar_resnet_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        cifar_resnet(8, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("size", "stages"), [(32, (32, 16, 8)), (8, (8, 4, 2)), (9, (9, 5, 3))])
def test_cifar_resnet_halves_the_image_twice(size, stages, norm):
    model = cifar_resnet(14, norm, in_channels=1, num_classes=7)
    shapes = []
    for unit in model.units:
        unit.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    expected = [(16, stages[0], stages[0]), (32, stages[1], stages[1]), (64, stages[2], stages[2])]
    assert shapes == [shape for shape in expected for _ in range(2)]


@pytest.mark.parametrize("norm", NORMS)
def test_cifar_resnet_trains_every_parameter(norm):
    model = cifar_resnet(8, norm, noise=0.1)
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_cifar_resnet_puts_layers_where_the_norm_says(norm):
    model = cifar_resnet(14, norm)
    kinds = {type(module) for module in convolutions(model)}
    assert kinds == {CZMConv2d if norm == "czm" else nn.Conv2d}
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(batch_norms) == (len(convolutions(model)) if norm == "bn" else 0)
    assert (convolutions(model)[0].bias is None) == (norm == "bn")
    assert all(m.bias is None for m in convolutions(model.units))
    assert model.classifier.bias is not None


@pytest.mark.parametrize("norm", ["czm", "none"])
def test_cifar_resnet_residual_bias(norm):
    model = cifar_resnet(8, norm, residual_bias=True)
    assert all(module.bias is not None for module in convolutions(model))


def test_cifar_resnet_is_zero_mean_from_the_stem_on():
    model = cifar_resnet(8)
    means = [module.weight.mean(dim=(2, 3)).abs().max() for module in convolutions(model)]
    # A mean of 9 float32 numbers below 0.8: 9 roundings of 2**-24 each.
    assert max(means[1:]) <= 9 * 2**-24 * 0.8
    assert means[0] > 1e-3
    assert not model.classifier.bias.any()


def test_shortcut_subsamples_and_pads_with_zero_channels():
    unit = cifar_resnet(8).units[1]
    x = torch.randn(2, 16, 8, 8)
    shortcut = unit.shortcut(x)
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2])
    assert shortcut.shape == (2, 32, 4, 4)
    assert not shortcut[:, 16:].any()


def forward_with_noise_on_the_inputs(model, x, amplitude, noise_on):
    """The network as paper section 4.4 says it: noise multiplies the input of every unit."""
    x = F.relu(model.stem(x))
    for unit in model.units:
        factor = torch.empty(x.shape[:2]).uniform_(1 - amplitude, 1 + amplitude)
        noisy = x * factor[:, :, None, None]
        kept = noisy if noise_on == "unit" else x
        x = F.relu(unit.conv2(F.relu(unit.conv1(noisy))) + unit.shortcut(kept))
    return model.classifier(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("noise_on", NOISE_ON)
def test_noise_multiplies_the_input_of_every_unit(noise_on):
    torch.manual_seed(0)
    model = cifar_resnet(14, noise=0.3, noise_on=noise_on)
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    expected = forward_with_noise_on_the_inputs(model, x, 0.3, noise_on)
    torch.manual_seed(1)
    actual = model(x)
    # relu(z) * u and relu(z * u) round alike, so each of the 14 layers may only reorder its sums of
    # up to 576 terms; 14 * sqrt(576) roundings, relative to the largest output.
    tolerance = 14 * 24 * 2**-24 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("noise_on", NOISE_ON)
@pytest.mark.parametrize("norm", NORMS)
def test_noise_is_drawn_in_training_only(norm, noise_on):
    noisy, clean = cifar_resnet(8, norm, noise=0.3, noise_on=noise_on), cifar_resnet(8, norm)
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(noisy.train()(x), noisy(x))
    clean.load_state_dict(noisy.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(noisy.eval()(x), clean.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)


def bytes_saved_for_backward(model, x):
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("norm", ["czm", "none"])
def test_training_saves_the_inputs_of_the_convolutions_and_no_more(norm):
    batch, size, units = 4, 16, 3
    x = torch.randn(batch, 3, size, size)
    saved = bytes_saved_for_backward(cifar_resnet(20, norm, noise=0.1), x)
    image = batch * 3 * size**2
    # The stem's output, then two activations a unit.
    shapes = ((16, size), (32, size // 2), (64, size // 4))
    stages = [batch * width * side**2 for width, side in shapes]
    activations = stages[0] + 2 * units * sum(stages)
    # One factor for each sample and channel, for all units but the last's output.
    noise = batch * (16 * (units + 1) + 32 * units + 64 * (units - 1))
    pooled = batch * 64
    assert saved == 4 * (image + activations + noise + pooled)


def test_training_saves_half_of_what_batch_norm_saves():
    x = torch.randn(4, 3, 16, 16)
    ours = bytes_saved_for_backward(cifar_resnet(20, noise=0.1), x)
    theirs = bytes_saved_for_backward(cifar_resnet(20, "bn"), x)
    # Four activations a unit against two; the noise's factors are the slack.
    assert ours <= 0.53 * theirs


@pytest.mark.parametrize("capture", [torch.jit.script, torch.fx.symbolic_trace])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("noise_on", NOISE_ON)
def test_cifar_resnet_can_be_captured(capture, norm, noise_on):
    model = cifar_resnet(8, norm, noise=0.1, noise_on=noise_on)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(capture(model)(images), capture(model)(images))
    model.eval()
    torch.testing.assert_close(capture(model)(images), model(images))
