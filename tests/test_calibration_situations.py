"""calibrate_, and what it shares with diagnose, on models with hooks or with empty outputs."""

import warnings

import pytest
import torch
from torch import nn

from czm_fused import convert
from czm_fused.calibration import calibrate_
from czm_fused.diagnostics import diagnose


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


class Detector(nn.Module):
    """Detects nothing: its head reads no regions, and its first output is empty."""

    def __init__(self, with_features):
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(4, 2, 1)
        self.with_features = with_features

    def forward(self, x):
        features = self.trunk(x)
        found = {"boxes": self.head(features[:0]), "labels": torch.zeros(0).long()}
        return {**found, "features": features} if self.with_features else found


IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_empty_outputs_are_passed_over():
    with pytest.warns(UserWarning) as caught:
        report = calibrate_(Detector(with_features=True), IMAGES)
    assert [str(each.message).partition(";")[0] for each in caught] == [
        "convolutions left as they were (never ran): head"
    ]
    assert report.output_after == pytest.approx(1, rel=1e-4)


def test_a_model_whose_output_is_empty_is_warned_of():
    with pytest.warns(UserWarning) as caught:
        calibrate_(Detector(with_features=False), IMAGES)
    assert [str(each.message).partition(";")[0] for each in caught] == [
        "convolutions left as they were (never ran): head",
        "the model's output is empty, as of a detector without detections",
    ]


def test_diagnose_passes_over_what_is_empty():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = diagnose(Detector(with_features=True), IMAGES)
        assert diagnose(Detector(with_features=False), IMAGES).output_spread is None
    trunk, head = report.layers
    assert head.output_spread is None and head.signal_gain is None
    assert report.output_spread == pytest.approx(trunk.output_spread)


@pytest.mark.parametrize("start", [calibrate_, convert])
def test_models_without_memory_are_refused(start):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="must have weights to measure with, but is on the meta"):
        start(model, example_input=torch.randn(16, 3, 8, 8, device="meta"))
    assert model[0].bias is None
