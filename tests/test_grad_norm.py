"""FusedCZMSGD(grad_norm=): what becomes of each gradient, and what it leaves."""

import math

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD, czm_param_groups
from helpers.tensors import LAYOUTS, laid_out

BACKENDS = ("cpu", "reference")


def _first_momentum(weight, grad, backend, **options):
    """Return the momentum after the first step of a lone weight: its gradient by V."""
    parameter = nn.Parameter(weight)
    parameter.grad = grad
    groups = [{"params": [parameter], "exp_scale": True}]
    optimizer = FusedCZMSGD(groups, 1e-3, 0.9, zmg=0, luma=0, backend=backend, **options)
    optimizer.step()
    return optimizer.state[parameter]["momentum_buffer"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 1, 3, 3), (7, 6, 1, 1), (2, 3, 5)])
def test_every_direction_has_the_same_norm(shape, dtype, layout, backend):
    torch.manual_seed(0)
    sizes = torch.logspace(-6, 6, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    weight = laid_out(torch.randn(shape, dtype=dtype), layout)
    grad = laid_out(sizes * torch.randn(shape, dtype=dtype), layout)
    momentum = _first_momentum(weight.clone(), grad, backend, grad_norm=0.5)
    # n squares are added up in float32, n / 2 roundings at most, and a few more make the factor.
    tolerance = (weight[0].numel() / 2 + 10) * torch.finfo(dtype).eps
    norms = momentum.double().flatten(1).norm(dim=1)
    assert ((norms - 0.5).abs() <= 0.5 * tolerance).all()
    expected = grad.double().flatten(1)
    expected = 0.5 * expected / expected.norm(dim=1, keepdim=True)
    assert ((momentum.double().flatten(1) - expected).abs() <= tolerance * expected.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**16])
def test_a_factor_of_the_loss_changes_nothing(factor, backend):
    """So GradScaler's scale does not, nor the number of images."""
    torch.manual_seed(0)
    weight, grad = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    one, other = (
        _first_momentum(weight.clone(), each, backend, grad_norm=0.1)
        for each in (grad, factor * grad)
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_whose_squares_are_zero_stays(backend):
    weight, grad = torch.ones(2, 3, 3, 3), torch.full((2, 3, 3, 3), 1e-35)
    momentum = _first_momentum(weight, grad, backend, grad_norm=0.1)
    assert (momentum.flatten(1).norm(dim=1) <= 1e-30).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_weights_and_gradients_stay_finite(backend):
    weight, grad = torch.full((2, 3, 3, 3), 1e-20), torch.full((2, 3, 3, 3), 1e-20)
    _first_momentum(weight, grad, backend, grad_norm=0.1)
    assert weight.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_filter_of_zeros_grows_to_the_size_of_others_alone(scale, backend):
    """Its first step is `lr * grad_norm`, and each later one at most `lr * grad_norm / ‖W‖`."""
    parameter = nn.Parameter(torch.zeros(2, 3, 3, 3))
    optimizer = FusedCZMSGD(
        [parameter], lr=0.02, zmg=0, luma=0, exp_scale=False, grad_norm=0.1, backend=backend
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        parameter.grad = scale * torch.randn(2, 3, 3, 3, generator=generator)
        optimizer.step()
        norms = parameter.detach().flatten(1).norm(dim=1)
        if step == 0:
            torch.testing.assert_close(norms, torch.full((2,), 0.002))
    assert (norms <= 0.002 + 1 + 3 * 0.002).all() and (norms > 0.002).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_zeros_stay_and_what_is_not_finite_shows(backend):
    weight, grad = torch.ones(3, 1, 3, 3), torch.ones(3, 1, 3, 3)
    grad[0], grad[1, 0, 0, 0], grad[2, 0, 0, 0] = 0, math.inf, math.nan
    momentum = _first_momentum(weight, grad, backend, grad_norm=0.1)
    assert (momentum[0] == 0).all() and weight[0].isfinite().all()
    assert weight[1:].isnan().flatten(1).any(dim=1).all()


def test_a_tensor_switches_it_off_as_a_number_does():
    weight, grad = torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)
    for backend in BACKENDS:
        plain = _first_momentum(weight.clone(), grad, backend)
        off = _first_momentum(weight.clone(), grad, backend, grad_norm=torch.tensor(0.0))
        assert torch.equal(plain, off)


def test_an_optimizer_that_was_pickled_before_it_existed():
    parameter = nn.Parameter(torch.randn(2, 3, 3, 3))
    optimizer = FusedCZMSGD([parameter], lr=0.1)
    state = optimizer.__getstate__()
    del state["defaults"]["grad_norm"], state["param_groups"][0]["grad_norm"]
    restored = FusedCZMSGD.__new__(FusedCZMSGD)
    restored.__setstate__(state)
    restored.add_param_group({"params": [nn.Parameter(torch.randn(2, 3, 3, 3))]})
    assert [group["grad_norm"] for group in restored.param_groups] == [0.0, 0.0]


def test_what_it_leaves():
    """Biases, linear layers, and transposed convolutions, in the groups that a network needs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Linear(4, 2)
    )
    groups = czm_param_groups(model)
    optimizer = FusedCZMSGD(groups, lr=0.1, momentum=0.9, zmg=0, luma=0, grad_norm=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    filters = {model[0].weight, model[1].weight}
    for parameter in model.parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        if parameter in filters:
            norms = momentum.flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
        else:
            assert torch.equal(momentum, parameter.grad)


def test_rows_of_a_linear_layer_on_request():
    torch.manual_seed(0)
    linear = nn.Linear(4, 2)
    groups = czm_param_groups(linear, overrides={"rest": {"grad_norm": 0.25}})
    optimizer = FusedCZMSGD(groups, lr=0.1, momentum=0.9)
    norms = linear.weight.detach().norm(dim=1)
    for parameter in linear.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    momentum = optimizer.state[linear.weight]["momentum_buffer"]
    torch.testing.assert_close(norms * momentum.norm(dim=1), torch.full((2,), 0.25))
    assert torch.equal(optimizer.state[linear.bias]["momentum_buffer"], linear.bias.grad)


@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
def test_refusals(value):
    with pytest.raises(ValueError, match="grad_norm must be a finite number >= 0"):
        FusedCZMSGD(nn.Conv2d(1, 1, 1).parameters(), grad_norm=value)
