"""What a network without batch statistics can do, and one with BatchNorm cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from czm_fused import FusedCZMSGD, czm_param_groups
from czm_fused.models import cifar_resnet

IMAGES = 32
STEPS = 3


def trained(norm: str, micro_batch: int) -> list[torch.Tensor]:
    """Return the weights after a few steps on the same images, `micro_batch` of them at a time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (IMAGES,), generator=generator)
    torch.manual_seed(0)
    model = cifar_resnet(8, norm).double()
    optimizer = FusedCZMSGD(czm_param_groups(model), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for x, y in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            (F.cross_entropy(model(x), y) * len(x) / IMAGES).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def largest_difference(norm: str) -> float:
    whole, accumulated = trained(norm, IMAGES), trained(norm, 4)
    assert all(weight.isfinite().all() for weight in whole)
    return max((a - b).abs().max().item() for a, b in zip(whole, accumulated, strict=True))


def test_accumulated_micro_batches_train_as_the_whole_batch():
    # A weight's gradient sums 32 images of at most 64 pixels, in another order: by a random walk
    # that moves it by sqrt(2048) eps = 1e-14 of its size, of order 1. Three steps of lr 0.1 and
    # momentum 0.9 add up to 0.1 * (2.71 + 1.9 + 1) = 0.56 of that, 6e-15; the rest of the bound is
    # for what eight layers amplify.
    assert largest_difference("czm") <= 1e-12


def test_accumulated_micro_batches_do_not_with_batch_norm():
    assert largest_difference("bn") > 1e-3


def test_batch_size_one_trains():
    # The last stage sees one pixel: one number for each channel.
    generator = torch.Generator().manual_seed(0)
    image, label = torch.randn(1, 3, 4, 4, generator=generator), torch.tensor([3])
    torch.manual_seed(0)
    model = cifar_resnet(8, noise=0.1)
    optimizer = FusedCZMSGD(czm_param_groups(model), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]

    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cifar_resnet(8, "bn")(image)


def test_training_and_evaluation_give_the_same_outputs():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    ours, theirs = cifar_resnet(8), cifar_resnet(8, "bn")
    assert torch.equal(ours.train()(x), ours.eval()(x))
    assert (theirs.train()(x) - theirs.eval()(x)).abs().max() > 1e-2


def saved_for_backward(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a forward pass keeps, parameters, buffers and images excluded."""
    existing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in existing:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def test_noise_is_kept_at_half_of_batch_norm_s_memory_and_at_the_floor():
    batch, size, units = 2, 32, 3
    x = torch.randn(batch, 3, size, size)
    saved = saved_for_backward(cifar_resnet(20, noise=0.1), x)
    with_batch_norm = saved_for_backward(cifar_resnet(20, "bn"), x)
    # The stem's output and two activations a unit: what convolutions take and ReLUs return.
    stages = [16 * size**2, 32 * (size // 2) ** 2, 64 * (size // 4) ** 2]
    floor = 4 * batch * (stages[0] + 2 * units * sum(stages))
    assert floor <= saved <= 1.02 * floor
    assert saved <= 0.51 * with_batch_norm


def test_an_epoch_in_micro_batches_or_in_two_processes(benchmark_script, tmp_path, capsys):
    pytest.importorskip("sklearn")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch is built without torch.distributed, or without gloo")
    rows_file = tmp_path / "rows.jsonl"
    arguments = ["--steps", "2", "--json", str(rows_file)]
    assert benchmark_script("without_statistics").main(arguments) == 0
    rows = benchmark_script("common.rows").read(rows_file)
    values = {(row.provider, row.metric): row.p50 for row in rows}
    # A gradient sums 128 images of at most 64 pixels in another order: by a random walk that moves
    # it by sqrt(8192) eps = 1.1e-5 of its size, and the weights by that share of their way.
    bound = 8192**0.5 * torch.finfo(torch.float32).eps
    for part in ("accumulated", "data_parallel"):
        assert values["czm", part] <= bound
        assert values["bn", part] > 1e-3
    assert values["czm", "train_eval"] == 0 < values["bn", "train_eval"]
    assert values["czm", "single_image"] < 1
    assert values["bn", "single_image"] is None
    assert "impossible" in capsys.readouterr().out
