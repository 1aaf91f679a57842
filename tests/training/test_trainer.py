import copy

import pytest
import torch
from quick_runs import assert_same

from czm_fused.training import Config, data
from czm_fused.training.metrics import collapsed, rejection_is_due
from czm_fused.training.trainer import Trainer


@pytest.mark.parametrize("method", ["czmig", "bn"])
def test_rejection_is_of_every_convolution_and_changes_nothing(method):
    config = Config(depth=8, method=method)
    trainer = Trainer(config, data.digits(), torch.device("cpu"))
    before = copy.deepcopy(trainer.state_dict())
    found = trainer.rejection()
    assert_same(trainer.state_dict(), before)
    convolutions = [name for name, p in trainer.model.named_parameters() if p.dim() == 4]
    assert [f"{name}.weight" for name in found] == convolutions
    # Zero-mean filters leave of a shift what rounding leaves, 2**-24 of it a tap: 100 dB and more.
    spatial = [ratio for name, ratio in found.items() if name != "stem"]
    assert all((ratio > 100) == (method == "czmig") for ratio in spatial)


@pytest.mark.parametrize(("epochs", "times"), [(1, 1), (4, 4), (19, 19), (200, 20), (205, 21)])
def test_rejection_is_due_about_twenty_times(epochs, times):
    due = [epoch for epoch in range(1, epochs + 1) if rejection_is_due(epoch, epochs)]
    assert len(due) == times and due[-1] == epochs


def test_collapsed_is_the_share_below_a_tenth_of_the_median():
    assert collapsed(torch.tensor([0.0, 0.09, 0.11, 1.0, 1.0, 1.0, 1.0, 5.0])) == 0.25
