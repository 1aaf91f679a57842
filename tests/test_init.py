"""czm_init_ and czm_weight_: the initialisation of the paper's section 3.2."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from czm_fused.init import czm_init_, czm_weight_, named_convolutions
from czm_fused.nn import CZMConv2d, exp_scale

CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(4, 6, 5),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "3d": lambda: nn.Conv3d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "one_channel": lambda: nn.Conv2d(1, 4, 3),
}


def norms(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().double().flatten(1).norm(dim=1)


def means(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().double().flatten(2).mean(dim=2)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3)),
        nn.Conv2d(4, 8, 1),
        nn.Linear(8, 2),
    )


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_filters_have_the_gain_as_norm_and_slices_mean_zero(make):
    convolution = make()
    assert czm_init_(convolution) is convolution
    # A mean of n <= 27 float32 numbers below 1, of which the mean was taken: at most n eps.
    assert means(convolution.weight).abs().max() < 27 * torch.finfo(torch.float32).eps
    # A norm of n <= 108 squares, a quotient and a product: less than (n + 3) eps.
    torch.testing.assert_close(
        norms(convolution.weight),
        torch.full((len(convolution.weight),), 0.8).double(),
        rtol=111 * torch.finfo(torch.float32).eps,
        atol=0,
    )
    assert torch.equal(convolution.bias, torch.zeros_like(convolution.bias))


def test_weights_are_the_paper_s_recipe():
    weight = torch.empty(5, 3, 2, 2, dtype=torch.float64)
    czm_weight_(weight, gain=1.5, generator=torch.Generator().manual_seed(3))
    x = torch.empty(5, 3, 2, 2, dtype=torch.float64)
    x.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    for filter_, drawn in zip(weight, x, strict=True):
        for channel in drawn:
            channel -= channel.mean()
        torch.testing.assert_close(filter_, 1.5 * drawn / drawn.norm(), rtol=1e-14, atol=1e-15)


def test_generator_alone_decides():
    state = torch.get_rng_state()
    first, second = (
        czm_init_(
            nn.utils.skip_init(nn.Conv2d, 3, 4, 3), generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    )
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(state, torch.get_rng_state())
    czm_init_(second)
    assert not torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_the_rounded_float32_weights(dtype):
    half, full = (
        czm_weight_(torch.empty(4, 3, 3, 3, dtype=each), generator=torch.Generator().manual_seed(0))
        for each in (dtype, torch.float32)
    )
    assert torch.equal(half, full.to(dtype))


def test_layout_changes_nothing():
    weight = torch.empty(4, 3, 3, 3).to(memory_format=torch.channels_last)
    strides = weight.stride()
    czm_weight_(weight, generator=torch.Generator().manual_seed(0))
    assert weight.stride() == strides
    contiguous = czm_weight_(torch.empty(4, 3, 3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight, contiguous)


@pytest.mark.parametrize("by_name", [False, True])
def test_stem_and_pointwise_filters_keep_their_means(by_name):
    network = model()
    untouched = [p.clone() for p in (*network[1][1].parameters(), *network[3].parameters())]
    czm_init_(network, stem="0" if by_name else network[0])
    assert (means(network[0].weight).abs() > 1e-3).any()
    assert (means(network[2].weight).abs() > 1e-3).any()
    assert means(network[1][0].weight).abs().max() < 1e-6
    for convolution in (network[0], network[1][0], network[2]):
        expected = torch.full((convolution.out_channels,), 0.8)
        torch.testing.assert_close(norms(convolution.weight).float(), expected)
        assert not convolution.bias.any()
    after = [*network[1][1].parameters(), *network[3].parameters()]
    assert all(map(torch.equal, untouched, after))


@pytest.mark.parametrize("filters", [4, 8])
def test_depthwise_filters_keep_their_means(filters):
    torch.manual_seed(0)
    built = CZMConv2d(4, filters, 3, groups=4)
    for convolution in (built, czm_init_(nn.Conv2d(4, filters, 3, groups=4), zero_mean=True)):
        assert (means(convolution.weight).abs() > 1e-3).any()
        expected = torch.full((filters,), 0.8)
        torch.testing.assert_close(norms(convolution.weight).float(), expected)


@pytest.mark.parametrize(
    ("measured", "zero_mean", "expected"),
    [
        (False, None, True),
        (False, False, False),
        (True, None, False),
        (True, True, True),
        (True, False, False),
    ],
)
def test_means_are_zero_where_the_paper_s_gain_is_or_on_demand(measured, zero_mean, expected):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    example = torch.randn(16, 3, 8, 8) if measured else None
    czm_init_(network, example_input=example, zero_mean=zero_mean, stem="0")
    assert (means(network[0].weight).abs() > 1e-3).any()
    # The measured scale may be some times the norm 0.8, and the rounding with it.
    largest = means(network[2].weight).abs().max()
    assert largest < 1e-6 if expected else largest > 1e-2


def test_convolutions_built_as_stems_are_known():
    network = nn.Sequential(CZMConv2d(3, 4, 3, stem=True), CZMConv2d(4, 4, 3))
    czm_init_(network)
    assert (means(network[0].weight).abs() > 1e-3).any()
    assert means(network[1].weight).abs().max() < 1e-6


def test_requires_grad_and_autograd_are_left_alone():
    network = model()
    network[0].weight.requires_grad_(False)
    czm_init_(network)
    assert not network[0].weight.requires_grad
    assert network[1][0].weight.requires_grad
    assert network[1][0].weight.grad_fn is None


@pytest.mark.parametrize("zero_mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filter_without_a_direction_stays_zero(monkeypatch, zero_mean, dtype):
    constant = 0.0 if not zero_mean else 0.5
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(constant))
    weight = czm_weight_(torch.empty(2, 3, 2, 2, dtype=dtype), zero_mean=zero_mean)
    assert torch.equal(weight, torch.zeros_like(weight))


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    gain=st.floats(1e-3, 1e3),
    zero_mean=st.booleans(),
)
def test_any_shape_gets_filters_of_norm_gain(shape, gain, zero_mean):
    weight = czm_weight_(torch.empty(shape, dtype=torch.float64), gain=gain, zero_mean=zero_mean)
    expected = torch.full((shape[0],), gain, dtype=torch.float64)
    # 625 squares in float64: far less than this.
    torch.testing.assert_close(norms(weight), expected, rtol=1e-12, atol=0)
    if zero_mean and weight.shape[2:].numel() > 1:
        assert means(weight).abs().max() < 1e-12 * gain


def test_empty_and_meta_weights_pass():
    assert czm_weight_(torch.empty(0, 3, 3, 3)).shape == (0, 3, 3, 3)
    assert czm_init_(nn.Conv2d(3, 4, 3, device="meta")).weight.is_meta


def test_parametrized_weights_are_assigned():
    convolution = czm_init_(exp_scale(nn.Conv2d(3, 4, 3)), gain=2.0)
    torch.testing.assert_close(norms(convolution.weight).float(), torch.full((4,), 2.0))
    torch.testing.assert_close(
        convolution.parametrizations.weight.original1.exp().detach(), torch.full((4,), 2.0)
    )
    assert parametrize.is_parametrized(convolution)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gain": 0.0}, "gain must be a positive number, but was 0.0"),
        ({"gain": float("nan")}, "gain must be"),
        ({"stem": "no.such"}, r"stem must name a convolution of the model, one of '0', '1.0', '2'"),
        ({"stem": "1.1"}, "stem must name a convolution"),
        ({"stem": nn.Conv2d(3, 4, 3)}, "stem must be a convolution of the model"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(arguments, message):
    network = model()
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(ValueError, match=message):
        czm_init_(network, **arguments)
    assert all(map(torch.equal, before, network.parameters()))


def pruned(convolution):
    return prune.l1_unstructured(convolution, "weight", 0.5)


def hooked_weight_norm(convolution):
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(convolution)


def bias_pruned(convolution):
    return prune.identity(convolution, "bias")


class Doubled(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, weight):
        return 2 * weight


class Negated(nn.Module):
    def forward(self, bias):
        return -bias

    def right_inverse(self, bias):
        return -bias


def doubled(convolution):
    parametrize.register_parametrization(convolution, "weight", Doubled())
    return convolution


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (pruned, "weight of convolution '1' must be a parameter, but a hook computes it"),
        (bias_pruned, "bias of convolution '1' must be a parameter, but a hook computes it"),
        (hooked_weight_norm, "but a hook computes it; .*remove_weight_norm"),
        (nn.utils.spectral_norm, "but a hook computes it; .*remove_spectral_norm"),
        (parametrizations.spectral_norm, "parametrization _SpectralNorm computes another"),
        (parametrizations.orthogonal, "parametrization _Orthogonal computes another"),
        (doubled, "parametrization Doubled has no inverse .*; .*remove_parametrizations"),
    ],
)
def test_weights_that_cannot_be_set_are_refused_and_nothing_is_changed(wrap, message):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), wrap(nn.Conv2d(4, 4, 3)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        czm_init_(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weight_norm_by_parametrization_computes_the_initial_weight():
    convolution = czm_init_(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    assert parametrize.is_parametrized(convolution)
    torch.testing.assert_close(norms(convolution.weight.detach()).float(), torch.full((4,), 0.8))
    assert means(convolution.weight).abs().max() < 1e-6


def test_a_parametrized_bias_is_zero():
    convolution = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(convolution, "bias", Negated())
    assert not czm_init_(convolution).bias.any()


def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))


def traced():
    return torch.jit.trace(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 4, 4))


def exported():
    return torch.export.export(nn.Conv2d(3, 4, 3), (torch.ones(1, 3, 4, 4),)).module()


def traced_by_fx():
    return torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), CZMConv2d(4, 4, 3)))


@pytest.mark.parametrize(
    ("make", "compiler"),
    [
        (scripted, "scripted"),
        (traced, "traced"),
        (exported, "exported"),
        (traced_by_fx, "traced by torch.fx through its convolutions"),
    ],
)
def test_models_without_python_modules_are_refused(make, compiler):
    with pytest.raises(ValueError, match=f"its module '1' is .*{compiler}.*pass the model that"):
        czm_init_(nn.Sequential(nn.ReLU(), make()))
    with pytest.raises(ValueError, match=f"but it is .*{compiler}"):
        named_convolutions(make())


def test_a_model_traced_by_fx_is_initialised():
    network = torch.fx.symbolic_trace(model())
    czm_init_(network)
    torch.testing.assert_close(norms(network.get_submodule("0").weight).float().max().item(), 0.8)


@pytest.mark.parametrize("not_a_module", [[nn.Conv2d(3, 4, 3).weight], {}, None])
def test_what_is_not_a_module_is_refused(not_a_module):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, but was of type"):
        czm_init_(not_a_module)


def test_a_flattened_weight_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network[0].weight = nn.Parameter(network[0].weight.detach().flatten())
    with pytest.raises(ValueError, match=r"shape was \(108,\); .*FullyShardedDataParallel"):
        czm_init_(network)


def spread(output):
    return output.transpose(0, 1).flatten(1).var(dim=1).mean().sqrt().item()


def test_example_input_gives_every_convolution_the_same_spread():
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU()) for _ in range(5)])
    images = torch.randn(32, 6, 16, 16)
    assert spread(czm_init_(network)(images)) < 0.05
    assert czm_init_(network, example_input=images) is network
    for unit in network:
        # The batch is the one that was measured: only rounding is left.
        assert spread(unit[0](images)) == pytest.approx(1.0, rel=0.02)
        images = unit(images)


def test_example_input_that_cannot_be_measured_changes_nothing():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="example_input"):
        czm_init_(network, example_input=torch.full((16, 3, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="gain must be None with example_input"):
        czm_init_(network, example_input=torch.randn(16, 3, 8, 8), gain=0.8)
    assert all(torch.equal(network.state_dict()[name], t) for name, t in before.items())


def test_lazy_convolutions_are_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    before = network[0].weight.clone()
    with pytest.raises(ValueError, match="lazy convolution '1' has no weight yet"):
        czm_init_(network)
    assert torch.equal(before, network[0].weight)
    with pytest.raises(ValueError, match="weight must have the dimensions"):
        czm_weight_(torch.ones(3))
    with pytest.raises(ValueError, match="weight has no shape yet"):
        czm_weight_(network[1].weight)


def test_sharded_models_are_refused(fully_shard):
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    fully_shard(network[0])
    weight = network[0].weight.full_tensor().clone()
    with pytest.raises(ValueError, match="model must not be sharded yet, but its module '0' is"):
        czm_init_(network)
    assert torch.equal(network[0].weight.full_tensor(), weight)
