"""calibrate_ on models with hooks of their own."""

import pytest
import torch
from torch import nn

from czm_fused.calibration import calibrate_


def _spread(output):
    return output.detach().transpose(0, 1).flatten(1).var(dim=1, correction=0).mean().sqrt().item()


@pytest.mark.parametrize("weigh_taps", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_hooks_of_the_user_run_on_what_is_set(bias, weigh_taps):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.Conv2d(4, 5, 3, padding=1)
    first.register_forward_hook(lambda module, args, output: (output * 3).tanh())
    model = nn.Sequential(first, second)
    images = torch.randn(16, 3, 8, 8)
    report = calibrate_(model, images, weigh_taps=weigh_taps)
    assert [layer.after for layer in report.layers] == [1.0, 1.0]
    # The batch is the one that was measured: only rounding is left.
    for output in (first.forward(images), model(images)):
        assert _spread(output) == pytest.approx(1, rel=1e-4)
    assert report.output_after == pytest.approx(1, rel=1e-4)
