"""Hugging Face Accelerate's `prepare` around FusedCZMSGD."""

import pytest
import torch
from short_training import BATCH, assert_same, loss_of, network, optimizer_of, task, train
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from czm_fused.diagnostics import watch

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def prepare():
    """Return an accelerator, and a network, an optimizer, a loader and a schedule it prepared."""

    def prepared(**options):
        accelerator = accelerate.Accelerator(cpu=True, **options)
        model = network()
        optimizer = optimizer_of(model)
        loader = DataLoader(TensorDataset(*task()), batch_size=BATCH)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)
        return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)

    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield prepared
    reset(reset_partial_state=True)


def epoch(accelerator, model, optimizer, loader, schedule, clip=None):
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def test_training_is_the_training_by_hand(prepare):
    accelerator, model, *rest = prepare()
    epoch(accelerator, model, *rest)
    epoch(accelerator, model, *rest)
    twin = network()
    train(twin, optimizer_of(twin), 8)
    assert_same(accelerator.unwrap_model(model).state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}], ids=str
)
def test_training_learns(prepare, options):
    accelerator, model, *rest = prepare(**options)
    for _ in range(8):
        epoch(accelerator, model, *rest, clip=1.0)
    assert loss_of(accelerator.unwrap_model(model)) < 0.5 * loss_of(network())


def test_training_goes_on_from_a_saved_state(prepare, tmp_path):
    accelerator, model, *rest = prepare()
    epoch(accelerator, model, *rest)
    accelerator.save_state(tmp_path)
    epoch(accelerator, model, *rest)
    expected = {name: p.clone() for name, p in model.state_dict().items()}
    accelerator.load_state(tmp_path)
    epoch(accelerator, model, *rest)
    assert_same(model.state_dict(), expected)


def test_an_overflow_reads_as_a_skipped_step(prepare):
    """And the learning-rate schedule does not advance."""
    prepare()
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(optimizer_of(model), scaler=scaler)
    for infinite in (False, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        images, labels = task()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss * float("inf") if infinite else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is infinite
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(same) if infinite else not any(same)


def test_watch_takes_what_was_prepared(prepare):
    accelerator, model, optimizer, loader, schedule = prepare()
    logs = {}
    handle = watch(model, optimizer, task()[0], log=lambda x, step: logs.update({step: x}), every=2)
    epoch(accelerator, model, optimizer, loader, schedule)
    handle.remove()
    assert list(logs) == [2, 4]
    # The rate at which directions turn is known only to the optimizer.
    assert any(name.endswith("effective_lr") for name in logs[4])
