"""tap_coverage: the share of its positions at which each tap meets the input."""

import pytest
import torch
from torch import nn

from czm_fused.calibration import tap_coverage


def _changed(convolution, **attributes):
    """Return a convolution that was built otherwise, as segmentation networks dilate theirs."""
    for name, value in attributes.items():
        setattr(convolution, name, value)
    return convolution


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
        (_changed(nn.Conv2d(2, 3, 3, padding=1), dilation=(2, 2), padding=(2, 2)), (8, 8)),
        (_changed(nn.Conv2d(2, 3, 3, padding="same"), dilation=(3, 1)), (4, 3)),
        (_changed(nn.Conv1d(2, 3, 3, padding=1), padding="valid"), (4,)),
        (_changed(nn.Conv1d(2, 3, 1, padding=1), weight=nn.Parameter(torch.ones(3, 2, 3))), (2,)),
    ],
    ids=str,
)
def test_tap_coverage_counts_where_a_tap_meets_the_input(convolution, size):
    ones = torch.ones(1, 2, *size)
    kernel = convolution.weight.shape[2:]
    counted = torch.empty(kernel)
    nn.init.zeros_(convolution.bias)
    for tap in torch.cartesian_prod(*(torch.arange(k) for k in kernel)).view(
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


def test_tap_coverage_takes_what_forward_takes():
    tuples = _changed(nn.Conv2d(2, 3, 3), padding=(2, 2), dilation=(2, 2), stride=(2, 2))
    numbers = _changed(nn.Conv2d(2, 3, 3), padding=2, dilation=2, stride=2)
    ones = torch.ones(1, 2, 5, 6)
    assert numbers(ones).shape == tuples(ones).shape
    expected, actual = (
        tap_coverage(each, ones.shape, tuples(ones).shape) for each in (tuples, numbers)
    )
    assert torch.equal(actual, expected)
