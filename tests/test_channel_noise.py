"""The noise that convert puts where BatchNorm stood, and the byte it keeps of each factor."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from czm_fused._internal.residual import branch_ends
from czm_fused.nn import ChannelNoise
from helpers.conversion import Function, conv

SHAPES = [(4, 3), (4, 3, 16), (4, 3, 16, 16), (1, 5, 3, 1), (2, 3, 4, 5, 6), (0, 3, 2, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def noisy(x: Tensor, amplitude: float = 0.3, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return ChannelNoise(amplitude)(x)


def factors(x: Tensor, amplitude: float = 0.3) -> Tensor:
    """Return u in float64, from what the same seed makes of ones."""
    return noisy(torch.ones(x.shape, dtype=torch.float64), amplitude)


def assert_product(result: Tensor, x: Tensor, u: Tensor) -> None:
    # Half a unit in the last place for each of x * levels, its multiple, the sum and the result.
    eps = torch.finfo(x.dtype).eps
    expected = x.double() * u
    assert ((result.double() - expected).abs() <= 2 * eps * expected.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_multiply_by_the_same_noise(shape, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(shape, dtype=dtype)
    u = factors(x)
    y = noisy(x)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype and y.shape == x.shape
    assert_product(y.detach(), x.detach(), u)
    assert_product(x.grad, grad, u)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays(layout):
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=layout)
    y = noisy(x.requires_grad_())
    y.backward(torch.ones_like(y))
    assert y.stride() == x.grad.stride() == x.stride()


def test_the_noise_is_uniform_around_one():
    amplitude = 0.25
    u = factors(torch.empty(512, 512), amplitude)
    levels = (u - 1) * 127.5 / amplitude
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-10)
    counts = torch.bincount((levels.round() + 127).long().flatten(), minlength=255)
    assert counts.shape == (255,)
    # chi-squared of 254 degrees of freedom: its mean and five of its standard deviations.
    expected = u.numel() / 255
    assert ((counts - expected) ** 2 / expected).sum() < 254 + 5 * math.sqrt(2 * 254)
    rows = u - 1
    # Neighbours are independent: the mean of n products of variance (a^2 / 3)^2.
    for products in (rows[1:] * rows[:-1], rows[:, 1:] * rows[:, :-1]):
        assert products.mean().abs() < 5 * amplitude**2 / 3 / math.sqrt(products.numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_a_byte_for_each_sample_and_channel(dtype):
    saved: list[Tensor] = []
    x = torch.randn(4, 3, 16, 16, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        noisy(x)
    assert sum(t.numel() * t.element_size() for t in saved) == 4 * 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_network_keeps_a_byte_too(backend):
    torch.compiler.reset()
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    y = torch.compile(ChannelNoise(0.3), backend=backend, fullgraph=True)(x)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert sum(t.numel() * t.element_size() for t in kept) == 4 * 3
    y.backward(torch.ones_like(y))
    assert_product(y.detach(), x.detach(), x.grad.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("traced", [False, True], ids=["script", "trace"])
def test_a_saved_network_is_noisy(traced):
    x = torch.ones(4, 3, 5, 5, requires_grad=True)
    layer = ChannelNoise(0.3)
    saved = torch.jit.trace(layer, x, check_trace=False) if traced else torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(saved, file)
    file.seek(0)
    y = torch.jit.load(file)(x)
    y.backward(torch.ones_like(y))
    assert y.std() > 0.1
    assert_product(y.detach(), x.detach(), x.grad.double())


def test_gradients_of_both_orders_and_modes():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(noisy, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(noisy, (x,))


def test_transforms_of_torch_func():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    u = factors(x)
    gradient = torch.func.grad(lambda x: noisy(x).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * x * u * u)
    _, tangent = torch.func.jvp(noisy, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, u)
    samples = torch.ones(6, 3, 4, 5)
    same = torch.vmap(ChannelNoise(0.3), randomness="same")(samples)
    assert same.std(dim=0).max() == 0 and same.std() > 0.1
    assert torch.vmap(ChannelNoise(0.3), randomness="different")(samples).std(dim=0).min() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_noise_again(use_reentrant):
    x = torch.ones(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    layer = nn.Sequential(ChannelNoise(0.3), nn.ReLU(inplace=True))
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, y.detach(), rtol=0, atol=0)


def test_the_next_layer_may_change_the_result_in_place():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    y = noisy(x).relu_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, factors(x) * (y > 0))


def test_the_ends_of_branches_are_found_behind_noise():
    modules = {"first": conv(3), "second": conv(), "third": conv(), "noise": ChannelNoise(0.3)}

    def function(m, x):
        x = m.first(x)
        return m.noise(m.third(torch.relu(m.noise(m.second(x))))) + x

    model = Function(function, **modules)
    convolutions = {name: modules[name] for name in ("first", "second", "third")}
    assert branch_ends(model, convolutions, torch.randn(2, 3, 8, 8)) == {"third"}


@pytest.mark.parametrize("amplitude", [-0.1, 1.0, float("nan")])
def test_other_amplitudes_are_refused(amplitude):
    with pytest.raises(ValueError, match=r"amplitude must be in \[0, 1\)"):
        ChannelNoise(amplitude)
    layer = ChannelNoise(0.1)
    layer.amplitude = amplitude
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"amplitude must be in \[0, 1\)"):
            layer.train(mode)(torch.ones(2, 3))
