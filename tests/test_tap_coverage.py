"""tap_coverage: the share of its positions at which each tap meets the input."""

import pytest
import torch
from torch import nn

from czm_fused.calibration import tap_coverage


@pytest.mark.parametrize(
    "convolution, size",
    [
        (nn.Conv2d(2, 3, 3, padding=1), (1, 1)),
        (nn.Conv2d(2, 3, 3, padding=1), (2, 5)),
        (nn.Conv2d(2, 3, (3, 5), stride=2, padding=(1, 2)), (4, 3)),
        (nn.Conv2d(2, 2, 3, padding="same", dilation=2, groups=2), (3, 4)),
        (nn.Conv2d(2, 3, 4, padding="same"), (3, 3)),
        (nn.Conv1d(2, 3, 5, padding=3), (2,)),
        (nn.Conv3d(2, 3, 3, padding=1), (1, 2, 3)),
        (nn.Conv2d(2, 3, 1), (2, 2)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2)),
    ],
    ids=str,
)
def test_tap_coverage_counts_where_a_tap_meets_the_input(convolution, size):
    ones = torch.ones(1, 2, *size)
    counted = torch.empty(convolution.kernel_size)
    nn.init.zeros_(convolution.bias)
    for tap in torch.cartesian_prod(*(torch.arange(k) for k in convolution.kernel_size)).view(
        counted.numel(), -1
    ):
        with torch.no_grad():
            convolution.weight.zero_()[(slice(None), slice(None), *tap)] = 1
            met = convolution(ones)[0, 0] > 0
        counted[tuple(tap)] = met.float().mean()
    output = convolution(ones)
    # Both are ratios of small integers; products of them round once or twice.
    torch.testing.assert_close(
        tap_coverage(convolution, ones.shape, output.shape), counted, rtol=4e-7, atol=0
    )
