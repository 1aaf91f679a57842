"""exp_scale on every backend, forward and backward, against plain torch in float64."""

import pytest
import torch

from czm_fused.ops import exp_scale
from helpers.cases import DTYPES
from helpers.operator_backends import OPERATORS, TRITON_PTX_OPERATORS
from helpers.step_backends import on
from helpers.tensors import LAYOUTS, laid_out, poisoned

SHAPES = (
    (3,), (2, 5), (4, 1), (2, 5, 3), (3, 4, 3, 3), (2, 40, 5, 5), (3, 64, 1, 1), (1, 65, 3, 3),
    (7, 1, 5), (0, 3, 3), (2, 0, 3),
)  # fmt: skip
# For Triton's PTX, where every one is another kernel, for another alignment of its numbers.
FEW_SHAPES = ((2, 5, 3), (3, 16, 3, 3), (2, 0, 3))


def shapes_for(backend):
    if backend is TRITON_PTX_OPERATORS:
        return FEW_SHAPES
    return SHAPES if backend.is_simulated else (*SHAPES, (64, 33))


@on(OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exp_scale(dtype, layout, backend):
    generator = torch.Generator().manual_seed(0)

    def randn(shape, its_dtype, its_layout="contiguous", offset=0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(its_dtype)
        return laid_out(values, its_layout, offset).to(backend.device)

    real = torch.promote_types(dtype, torch.float32)
    eps, real_eps = torch.finfo(dtype).eps, torch.finfo(real).eps
    for number, shape in enumerate(shapes_for(backend)):
        # As often aligned as not.
        offset = number % 2
        direction, grad = (randn(shape, dtype, layout, offset) for _ in range(2))
        for g_dtype in {dtype, real}:
            g = 0.3 * randn(shape[:1], g_dtype)
            wide = [tensor.double() for tensor in (grad, direction, g)]

            def bound(value, roundings=8):
                """Some roundings of the arithmetic, and one of the stored type."""
                subnormal = torch.finfo(dtype).smallest_normal * eps
                return (roundings * real_eps + eps) * value.abs() + subnormal  # noqa: B023

            expected = exp_scale.reference.exp_scale(*wide[1:])
            with poisoned():
                weight = backend("exp_scale", direction, g)
            assert ((weight.double() - expected).abs() <= bound(expected)).all()
            expected_dv, expected_dg = exp_scale.reference.exp_scale_backward(*wide)
            with poisoned():
                dv, dg = backend("exp_scale_backward", grad, direction, g)
            assert ((dv.double() - expected_dv).abs() <= bound(expected_dv)).all()
            # A sum of n terms, in blocks, adds 2 sqrt(n) roundings of the terms' sizes.
            size = (expected_dv * wide[1]).abs().unsqueeze(-1).flatten(1).sum(1)
            terms = 0.0 if backend.sums_in_float64 else 2 * direction[:1].numel() ** 0.5
            limit = (8 + terms) * real_eps * size + torch.finfo(g_dtype).eps * expected_dg.abs()
            assert ((dg.double() - expected_dg).abs() <= limit).all()
            assert dg.dtype == g_dtype and weight.dtype == dv.dtype == dtype
