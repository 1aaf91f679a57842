"""add_relu_noise and exp_scale on a GPU, forward and backward, against plain torch in float64."""

import pytest
import torch

from czm_fused.ops import add_relu_noise, backends, exp_scale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("cuda", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    reason = backends.problem(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def operators(name):
    """Return the operator and its gradient."""
    return getattr(torch.ops.czm_fused, name), getattr(torch.ops.czm_fused, f"{name}_backward")


def tolerance(dtype):
    # A few products and a sum of numbers of size 1 to 10, and the rounding of the result.
    return 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 64, 8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_relu_noise(dtype, shape, layout, backend):
    torch.manual_seed(0)

    def randn():
        return torch.randn(shape, device="cuda").to(dtype).to(memory_format=layout)

    x, residual, grad = randn(), randn(), randn()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    noise = torch.empty(shape[:2], device="cuda", dtype=real).uniform_(0.9, 1.1)
    forward, backward = operators("add_relu_noise")
    output = forward(x, residual, noise)
    back = backward(grad, output, noise)
    wide = [t.double() for t in (x, residual, noise, grad)]
    expected = add_relu_noise.reference.add_relu_noise(*wide[:3])
    expected_back = add_relu_noise.reference.add_relu_noise_backward(
        wide[3], output.double(), wide[2]
    )
    bound = tolerance(dtype)
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(back.double(), expected_back, rtol=bound, atol=bound)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (64, 33), (7, 1, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_scale(dtype, shape, backend):
    torch.manual_seed(0)
    direction = torch.randn(shape, device="cuda").to(dtype)
    grad = torch.randn(shape, device="cuda").to(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    log_scale = 0.3 * torch.randn(shape[0], device="cuda", dtype=real)
    forward, backward = operators("exp_scale")
    weight = forward(direction, log_scale)
    torch.testing.assert_close(
        weight.double(),
        exp_scale.reference.exp_scale(direction.double(), log_scale.double()),
        rtol=tolerance(dtype),
        atol=tolerance(dtype),
    )
    leaves = [t.double().requires_grad_() for t in (direction, log_scale)]
    wide = exp_scale.reference.exp_scale(*leaves)
    expected = torch.autograd.grad(wide, leaves, grad.double())
    actual = backward(grad, direction, log_scale)
    for mine, theirs in zip(actual, expected, strict=True):
        # The sum over a filter adds at most numel roundings of numbers of size 1.
        bound = tolerance(dtype) * direction[0].numel() ** 0.5
        torch.testing.assert_close(mine.double(), theirs, rtol=bound, atol=bound)
