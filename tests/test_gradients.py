"""normalize_gradients_: what it makes of each gradient, and what it leaves."""

import copy
import math

import pytest
import torch
from torch import nn

from czm_fused import exp_scale, normalize_gradients_
from helpers.tensors import LAYOUTS, laid_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 3), (4, 1, 3, 3), (7, 6, 1, 1), (2, 3, 5), (1, 2, 2, 2, 2)]
)
def test_every_direction_has_the_same_norm(shape, dtype, layout):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    convolution = kind(shape[1], shape[0], shape[2:], dtype=dtype)
    values = torch.randn(shape).to(dtype)
    convolution.weight.grad = laid_out(values, layout)
    convolution.bias.grad = torch.full((shape[0],), 3.0, dtype=dtype)
    normalize_gradients_(convolution, norm=0.5)

    weight, grad = convolution.weight.detach().double().flatten(1), values.double().flatten(1)
    norms = weight.norm(dim=1) * grad.norm(dim=1)
    expected = grad * (0.5 / norms)[:, None]
    # The factor takes 3 roundings of the computation, its product with the gradient one of dtype;
    # norms of n numbers in float32 err by n / 2 roundings at most.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    relative = (4 + values[0].numel()) * eps + torch.finfo(dtype).eps
    error = (convolution.weight.grad.double().flatten(1) - expected).abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= relative * expected.abs() + smallest).all()
    assert (convolution.bias.grad == 3).all()


def test_what_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3),
        exp_scale(nn.Conv2d(4, 4, 1)),
        nn.ConvTranspose2d(4, 4, 1),
        nn.Linear(4, 2),
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[1].weight.grad = None
    model[0].weight.grad[0] = 0
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    normalize_gradients_(model)
    after = [p.grad for p in model.parameters()]
    assert after[2] is None
    assert (after[0][0] == 0).all() and not torch.equal(after[0][1:], before[0][1:])
    for old, new in list(zip(before, after, strict=True))[1:]:
        assert old is None or torch.equal(old, new)


def test_a_filter_of_zeros_keeps_no_gradient_and_what_is_not_finite_shows():
    convolution = nn.Conv2d(1, 3, 1)
    convolution.weight.data = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1)
    convolution.weight.grad = torch.tensor([2.0, math.inf, math.nan]).view(3, 1, 1, 1)
    normalize_gradients_(convolution)
    grad = convolution.weight.grad.flatten()
    assert grad[0] == 0 and grad[1:].isnan().all()


@pytest.mark.parametrize("norm", [0, -1, math.inf, math.nan])
def test_refusals(norm):
    with pytest.raises(ValueError, match="norm must be a positive number"):
        normalize_gradients_(nn.Conv2d(1, 1, 1), norm=norm)


def test_tied_filters_are_normalized_once():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    model[1].weight = model[0].weight
    model[0].weight.grad = torch.randn(2, 2, 1, 1)
    normalize_gradients_(model)
    weight = model[0].weight
    norms = weight.detach().flatten(1).norm(dim=1) * weight.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((2,), 0.1))


def test_every_layer_has_its_own_factors_whatever_its_dtype():
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    model = nn.Sequential(*(nn.Conv2d(2, 3, 3, dtype=dtype) for dtype in dtypes))
    for number, each in enumerate(model):
        each.weight.grad = (10.0**number * torch.randn_like(each.weight)).detach()
    alone = copy.deepcopy(model)
    for each, its in zip(model, alone, strict=True):
        its.weight.grad = each.weight.grad.clone()
        normalize_gradients_(its)
    normalize_gradients_(model)
    for each, its in zip(model, alone, strict=True):
        assert torch.equal(each.weight.grad, its.weight.grad)
