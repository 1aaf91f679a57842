"""Passes on an example leave the model as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from czm_fused import center_, czm_param_groups
from czm_fused.calibration import calibrate_
from czm_fused.conversion import plan_conversion
from czm_fused.diagnostics import diagnose

PASSES = {
    "center_": center_,
    "diagnose": diagnose,
    "plan_conversion": lambda model, x: plan_conversion(model, example_input=x),
    "calibrate_": lambda model, x: calibrate_(model, x, branch=1.0),
    "czm_param_groups": lambda model, x: czm_param_groups(model, example_input=x),
}


class Merging(nn.Linear):
    """Adds a summand to its weight in eval mode, as layers with LoRA do."""

    def __init__(self, *features):
        super().__init__(*features)
        self.summand = nn.Parameter(torch.ones(features[::-1]))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            with torch.no_grad():
                self.weight.add_(-self.summand if mode else self.summand)
            self.is_merged = not mode
        return self


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_what_a_change_of_mode_does_is_undone(run, training):
    layers = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Merging(4, 2)
    model = nn.Sequential(*layers).double().train(training)
    before = model[3].weight.detach().clone()
    for _ in range(3):
        run(model, torch.rand(4, 3, 8, 8, dtype=torch.float64))
    assert model[3].is_merged != training and model.training == training
    # Added and subtracted again in each of three calls, at a magnitude of at most 2.
    bound = 3 * 2 * 2 * torch.finfo(torch.float64).eps
    assert (model[3].weight - before).abs().max() <= bound


@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_graphs_of_both_modes_are_kept(run):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.dropout(self.conv(x), 0.5, self.training)

    x = torch.rand(4, 3, 8, 8)
    for training, share in ((True, 0.5), (False, 0.0)):
        model = extraction.create_feature_extractor(Dropping(), ["dropout"]).train(training)
        run(model, x)
        zeros = (model(x)["dropout"] == 0).float().mean().item()
        # 576 values; six deviations of their share.
        assert abs(zeros - share) <= (0.125 if training else 0.0)


def test_observers_that_get_their_size_in_a_pass_are_as_before():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(model.train(), inplace=True)
    before = copy.deepcopy(model.state_dict())
    diagnose(model, torch.rand(4, 3, 8, 8))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
