"""add_relu_noise on every backend, forward and backward, against plain torch."""

import pytest
import torch

from czm_fused.ops import add_relu_noise
from helpers.cases import DTYPES
from helpers.operator_backends import OPERATORS, TRITON_PTX_OPERATORS, WIDE_OPERATORS
from helpers.step_backends import on
from helpers.tensors import LAYOUTS, laid_out, poisoned

SHAPES = (
    (3, 5), (2, 3, 7), (2, 3, 5, 7), (2, 16, 5, 5), (3, 8, 16, 16), (1, 3, 40, 20), (0, 3, 2, 2),
    (1, 5, 1, 1),
)  # fmt: skip
# For Triton's PTX, where every one is another kernel, for another alignment of its numbers.
FEW_SHAPES = ((2, 3, 5, 7), (2, 16, 5, 5), (0, 3, 2, 2))


def shapes_for(backend):
    if backend is TRITON_PTX_OPERATORS:
        return FEW_SHAPES
    return SHAPES if backend.is_simulated else (*SHAPES, (4, 64, 8, 8))


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    return torch.equal(actual.nan_to_num(123.0), expected.nan_to_num(123.0)) and torch.equal(
        actual.isnan(), expected.isnan()
    )


@on((*OPERATORS, *WIDE_OPERATORS))
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_noise(dtype, layout, with_noise, backend):
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate(shapes_for(backend)):
        # As often aligned as not.
        offset = number % 2

        def activation():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: B023
            return laid_out(values.to(dtype), layout, offset).to(backend.device)  # noqa: B023

        x, residual, grad = (activation() for _ in range(3))
        if x.numel() > 3:
            x[0, 0] = float("nan")
            x[0, 1] = -float("inf")
        noise = None
        if with_noise:
            noise = torch.rand(shape[:2], dtype=torch.promote_types(dtype, torch.float32)) + 0.5
            noise = noise.to(backend.device)
        for other in (None, residual):
            expected = add_relu_noise.reference.add_relu_noise(x, other, noise)
            with poisoned():
                output = backend("add_relu_noise", x, other, noise)
                back = backend("add_relu_noise_backward", grad, output, noise)
            # One rounding an operation, in the same order: the same bits.
            assert same_bits(output, expected)
            expected_back = add_relu_noise.reference.add_relu_noise_backward(grad, expected, noise)
            assert same_bits(back, expected_back)
