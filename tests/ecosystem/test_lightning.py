"""Lightning's Trainer around FusedCZMSGD."""

import pytest
import torch
from short_training import BATCH, assert_same, batches, loss_of, network, optimizer_of, task
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from czm_fused import FusedCZMSGD, czm_param_groups

lightning = pytest.importorskip("lightning")

# Lightning asks for as many workers as the machine has cores, and for its newer self.
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, make_optimizer=optimizer_of):
        super().__init__()
        self.network = network()
        self.make_optimizer = make_optimizer

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.network)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture
def fit(tmp_path):
    """Train a module for some epochs, of 4 steps each; return its trainer."""

    def run(module, epochs, checkpoint=None, **options):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        loader = DataLoader(TensorDataset(*task()), batch_size=BATCH)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer

    return run


def by_hand(steps, clip):
    model = network()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for images, labels in batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        # In the order of the groups, as Lightning sums the norm.
        params = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        schedule.step()
    return model


def test_fit_is_the_training_by_hand(fit):
    module = Module()
    fit(module, 5, gradient_clip_val=0.5)
    assert_same(module.network.state_dict(), by_hand(20, clip=0.5).state_dict())
    assert loss_of(module.network) < 0.5 * loss_of(network())


def test_fit_goes_on_from_a_checkpoint(fit, tmp_path):
    module = Module()
    fit(module, 1, gradient_clip_val=0.5).save_checkpoint(tmp_path / "saved.ckpt")
    resumed = Module()
    fit(resumed, 2, tmp_path / "saved.ckpt", gradient_clip_val=0.5)
    assert_same(resumed.network.state_dict(), by_hand(8, clip=0.5).state_dict())


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 2}],
    ids=str,
)
def test_fit_learns(fit, options):
    module = Module()
    fit(module, 8, **options)
    assert loss_of(module.float().network) < 0.6 * loss_of(network())


def mixed(precision):
    """Return the plugin; on CPUs Lightning takes bfloat16 where it is asked for half by name."""
    return [lightning.pytorch.plugins.MixedPrecision(precision, "cpu")]


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["default", "unfused"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_in_mixed_precision(fit, precision, options):
    """A step is no longer than the norm to which its gradient is clipped."""

    def plain_sgd(model):
        off = {"exp_scale": False, "zmg": 0.0, "luma": 0.0}
        return FusedCZMSGD(model.parameters(), lr=1.0, **off, **options)

    moved = []
    for clip in (1e-3, None):
        module = Module(plain_sgd)
        before = [p.detach().clone() for p in module.network.parameters()]
        fit(
            module, 1, plugins=mixed(precision), gradient_clip_val=clip, limit_train_batches=1
        )
        after = module.network.parameters()
        squares = [(p - q).square().sum() for p, q in zip(after, before, strict=True)]
        moved.append(sum(squares).sqrt().item())
    assert moved[0] == pytest.approx(1e-3, rel=1e-2) and moved[1] > 2e-3


def test_an_overflow_in_half_precision_skips_the_step(fit):
    class Overflowing(Module):
        def training_step(self, batch, number):
            return super().training_step(batch, number) * float("inf")

    module = Overflowing()
    fit(module, 1, plugins=mixed("16-mixed"), gradient_clip_val=0.5)
    assert_same(module.network.state_dict(), network().state_dict())


class Unfreeze(lightning.pytorch.callbacks.BaseFinetuning):
    """Trains the classifier first, and everything from the second epoch on."""

    def freeze_before_training(self, module):
        self.freeze(module.network[:-1])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.network[:-1], optimizer, lr=0.05)


def classifier_optimizer(model):
    groups = czm_param_groups(model[-1])
    assert groups[0]["param_names"] == ["weight", "bias"]
    return FusedCZMSGD(groups, lr=0.05, momentum=0.9)


def test_finetuning_adds_groups_without_names(fit, tmp_path):
    module = Module(classifier_optimizer)
    fit(module, 1, callbacks=[Unfreeze()])
    assert torch.equal(module.network[0].weight, network()[0].weight)
    module = Module(classifier_optimizer)
    trainer = fit(module, 6, callbacks=[Unfreeze()])
    optimizer = trainer.optimizers[0]
    assert len(optimizer.param_groups) == 2
    assert "log_scale" in optimizer.state[module.network[0].weight]
    assert loss_of(module.network) < 0.7 * loss_of(network())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = Module(classifier_optimizer)
    fit(resumed, 7, tmp_path / "saved.ckpt", callbacks=[Unfreeze()])
    assert loss_of(resumed.network) < loss_of(module.network)
