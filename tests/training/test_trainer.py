import copy

import pytest
import torch
from quick_runs import assert_same

from czm_fused import center_
from czm_fused.training import Config, TrainingError, data, trainer
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


CENTERED = {"depth": 8, "batch_size": 69, "noise": 0.0, "residual_bias": True, "center_every": 3}


def test_means_are_measured_every_so_many_steps(monkeypatch):
    steps, measured = [], []

    def centered(model, images):
        measured.append(len(steps))
        before = model(images)
        assert center_(model, images) == 7
        # To rounding, over as many layers: eps * sqrt(144) of each.
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(trainer, "center_", centered)
    run = Trainer(Config(**CENTERED), data.digits(), torch.device("cpu"))
    names = run.model.state_dict().keys()
    run.optimizer.register_step_post_hook(lambda *_: steps.append(None))
    run.train_epoch()
    assert measured == list(range(0, len(steps), 3)) and len(measured) > 1
    # The network is a plain one again.
    assert run.model.state_dict().keys() == names


def test_centering_needs_biases():
    config = Config(**{**CENTERED, "residual_bias": False})
    with pytest.raises(TrainingError, match="--center-every acts on.*add --residual-bias"):
        Trainer(config, data.digits(), torch.device("cpu"))


def test_gradient_norm_and_rate_of_biases_reach_the_optimizer():
    config = Config(**CENTERED, grad_norm=0.1, bias_lr=0.01, luma=0.0, classifier_luma=1e-3)
    run = Trainer(config, data.digits(), torch.device("cpu"))
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    names = "lr", "luma", "grad_norm"
    assert {key: tuple(group[name] for name in names) for key, group in groups.items()} == {
        "stem": (0.4, 0.0, 0.1),
        "spatial": (0.4, 0.0, 0.1),
        "rest": (0.1, 1e-3, 0.0),
        "bias": (0.01, 1e-3, 0.0),
    }
    assert len(groups["bias"]["params"]) == 7


@pytest.mark.parametrize(("epochs", "times"), [(1, 1), (4, 4), (19, 19), (200, 20), (205, 21)])
def test_rejection_is_due_about_twenty_times(epochs, times):
    due = [epoch for epoch in range(1, epochs + 1) if rejection_is_due(epoch, epochs)]
    assert len(due) == times and due[-1] == epochs


def test_collapsed_is_the_share_below_a_tenth_of_the_median():
    assert collapsed(torch.tensor([0.0, 0.09, 0.11, 1.0, 1.0, 1.0, 1.0, 5.0])) == 0.25
