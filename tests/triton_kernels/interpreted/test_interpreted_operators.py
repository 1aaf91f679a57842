"""add_relu_noise and exp_scale in Triton against their statements in plain torch, on the CPU."""

import pytest
import torch

from czm_fused.functional import add_relu_noise
from czm_fused.ops import add_relu_noise as noise_ops
from czm_fused.ops import exp_scale as scale_ops
from czm_fused.ops.add_relu_noise import triton as noise_kernels
from czm_fused.ops.exp_scale import triton as scale_kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty filled with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(shape, dtype, layout="contiguous"):
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "channels_last" and len(shape) > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    return torch.equal(actual.nan_to_num(123.0), expected.nan_to_num(123.0)) and torch.equal(
        actual.isnan(), expected.isnan()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_noise", [False, True])
def test_add_relu_noise(dtype, layout, with_noise):
    torch.manual_seed(0)
    for shape in [(3, 5), (2, 3, 7), (2, 16, 5, 5), (1, 3, 40, 20), (0, 3, 2, 2), (1, 5, 1, 1)]:
        x, residual, grad = (randn(shape, dtype, layout) for _ in range(3))
        if x.numel() > 3:
            x[0, 0] = float("nan")
            x[0, 1] = -float("inf")
        noise = None
        if with_noise:
            noise = torch.rand(shape[:2], dtype=torch.promote_types(dtype, torch.float32)) + 0.5
        for other in (None, residual):
            expected = noise_ops.reference.add_relu_noise(x, other, noise)
            output = noise_kernels.add_relu_noise(x, other, noise)
            # One rounding an operation, in the same order: the same bits.
            assert same_bits(output, expected)
            assert same_bits(
                noise_kernels.add_relu_noise_backward(grad, output, noise),
                noise_ops.reference.add_relu_noise_backward(grad, expected, noise),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exp_scale(dtype, layout):
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    real_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for shape in [(3,), (2, 5), (3, 4, 3, 3), (1, 65, 3, 3), (0, 3, 3), (2, 0, 3)]:
        direction, grad = randn(shape, dtype, layout), randn(shape, dtype, layout)
        for g_dtype in {dtype, torch.float32}:
            g = randn(shape[:1], g_dtype)
            wide = [tensor.double() for tensor in (grad, direction, g)]
            # exp rounds its argument and itself, the product once, the output once.
            expected = scale_ops.reference.exp_scale(*wide[1:])
            bound = 2 * ((4 + g.abs().max().item() if g.numel() else 4) * real_eps + eps)
            actual = scale_kernels.exp_scale(direction, g)
            torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=1e-7 * eps)
            expected_dv, expected_dg = scale_ops.reference.exp_scale_backward(*wide)
            dv, dg = scale_kernels.exp_scale_backward(grad, direction, g)
            torch.testing.assert_close(dv.double(), expected_dv, rtol=bound, atol=1e-7 * eps)
            # A sum of n terms, in blocks, adds 2 sqrt(n) roundings of the terms' sizes.
            size = (expected_dv * wide[1]).abs().unsqueeze(-1).flatten(1).sum(1)
            tolerance = (bound + 2 * direction[:1].numel() ** 0.5 * real_eps) * size
            tolerance += torch.finfo(g_dtype).eps * expected_dg.abs()
            assert ((dg.double() - expected_dg).abs() <= tolerance).all()
            assert dg.dtype == g_dtype


def test_the_operators_dispatch_to_triton(monkeypatch):
    launches = []
    for kernels in (noise_kernels, scale_kernels):
        launch = kernels._launch
        monkeypatch.setattr(
            kernels, "_launch", lambda *args, of=launch: (launches.append(args[0]), of(*args))
        )
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    add_relu_noise(x, x.detach(), 0.1).sum().backward()
    direction, g = torch.randn(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
    torch.ops.czm_fused.exp_scale(direction, g).sum().backward()
    assert len(launches) == 4
    torch.testing.assert_close(direction.grad, torch.ones(2, 3))
