"""Training by DistributedDataParallel and fully_shard, with FusedCZMSGD, on two gloo processes."""

import pytest
import torch
from ranks import RANKS, on_both_ranks
from torch import nn
from torch.nn.utils import clip_grad_norm_

from czm_fused import FusedCZMSGD, center_, czm_param_groups
from small_training import assert_equal

pytest.importorskip("torch.distributed.tensor", exc_type=ImportError)
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import (  # noqa: E402
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

OPTIONS = {"lr": 0.1, "momentum": 0.9, "luma": 0.1, "nesterov": True}
STEPS = 4


def network(dtype=torch.float32):
    """Return a network of 5 filters, which share unevenly, and of one, which leaves a rank none."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 1, 1), nn.Flatten(), nn.Linear(16, 3)
    ).to(dtype)


def optimizer_of(model, **options):
    return FusedCZMSGD(czm_param_groups(model), **{**OPTIONS, **options})


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator).to(dtype)


def own_part(x):
    return x.chunk(RANKS)[dist.get_rank()]


def loss_of(model, x):
    return model(x).float().square().mean()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_near(model, single):
    # Each step sums the gradient of the batch, 8 samples of 16 places, in another order: some
    # 8 * 16 roundings of numbers of at most 1, times a rate, with momentum at most 10 times.
    bound = STEPS * 8 * 16 * torch.finfo(torch.float32).eps / 2 * OPTIONS["lr"] * 10
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert (full(p.detach()) - q.detach()).abs().max() <= bound


def step_alike(parallel, optimizer, single, plain, x):
    """Step by the whole batch `x`: both ranks together, and the single process."""
    loss_of(parallel, own_part(x)).backward()
    optimizer.step()
    plain.zero_grad()
    loss_of(single, x).backward()
    plain.step()


@on_both_ranks
def test_ddp_is_the_single_process_with_the_whole_batch():
    for wrap in ({}, {"gradient_as_bucket_view": True}):
        model, single = network(), network()
        parallel = DistributedDataParallel(model, **wrap)
        optimizer, plain = optimizer_of(parallel), optimizer_of(single)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=not wrap)
            step_alike(parallel, optimizer, single, plain, batch(step))
        assert_near(model, single)


@on_both_ranks
def test_ddp_accumulates_without_synchronisation():
    model, single = network(), network()
    parallel = DistributedDataParallel(model)
    optimizer, plain = optimizer_of(parallel), optimizer_of(single)
    for step in range(STEPS):
        first, second = batch(step).chunk(2)
        with parallel.no_sync():
            loss_of(parallel, own_part(first)).div(2).backward()
        loss_of(parallel, own_part(second)).div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(single, batch(step)).backward()
        plain.step()
        plain.zero_grad()
    assert_near(model, single)


@on_both_ranks
def test_fully_shard_is_the_single_process_with_the_whole_batch():
    for clips in (False, True):
        model, single = network(), network()
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        optimizer, plain = optimizer_of(model), optimizer_of(single)
        sizes = [p.to_local().shape[0] for p in model.parameters()]
        assert sizes == ([3, 3, 1, 1, 2, 2] if dist.get_rank() == 0 else [2, 2, 0, 0, 1, 1])
        for step in range(STEPS):
            x = batch(step)
            optimizer.zero_grad()
            loss_of(model, own_part(x)).backward()
            plain.zero_grad()
            loss_of(single, x).backward()
            if clips:
                norms = [clip_grad_norm_(m.parameters(), 0.01) for m in (model, single)]
                torch.testing.assert_close(full(norms[0]), norms[1])
            optimizer.step()
            plain.step()
        assert_near(model, single)
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            for name, value in optimizer.state[p].items():
                assert value.shape == plain.state[q][name].shape
                assert value.placements == (Shard(0),)


@on_both_ranks
def test_fully_shard_with_a_scaler_skips_on_all_ranks():
    model, single = network(), network()
    fully_shard(model)
    optimizer, plain = optimizer_of(model), optimizer_of(single)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        # Without clipping, and with; the first step and a later one meet an infinity.
        unscales, infinite = step >= 2, step in (0, 2)
        x = batch(step)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, own_part(x))).backward()
        before = [full(p.detach()).clone() for p in model.parameters()]
        if infinite and dist.get_rank() == 1:
            # In the part of one rank alone.
            next(model.parameters()).grad.to_local()[0, 0, 0, 0] = torch.inf
        if unscales:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update(1024.0)
        if infinite:
            assert_equal([full(p.detach()) for p in model.parameters()], before)
        else:
            plain.zero_grad()
            loss_of(single, x).backward()
            if unscales:
                clip_grad_norm_(single.parameters(), 0.01)
            plain.step()
    assert_near(model, single)


@on_both_ranks
def test_fully_shard_with_mixed_precision_offloading_and_half_weights():
    for dtype, policies in (
        (torch.float32, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}),
        (torch.float32, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
        (torch.bfloat16, {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}),
    ):
        model, whole = network(dtype), network(dtype)
        fully_shard(model, **policies)
        optimizer, plain = optimizer_of(model), optimizer_of(whole)
        for step in range(STEPS):
            x = batch(step, dtype)
            optimizer.zero_grad()
            loss_of(model, own_part(x)).backward()
            optimizer.step()
            # The forward and backward are FSDP's; the step is that of the whole, bit for bit.
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                assert p.dtype == p.grad.dtype == dtype
                q.grad = full(p.grad)
            plain.step()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert_equal(full(p.detach()), q.detach())
            for name, value in optimizer.state[p].items():
                assert_equal(full(value), plain.state[q][name])


@on_both_ranks
def test_centered_and_normalized_gradients():
    for shard in (False, True):
        model, single = network(), network()
        for each in (model, single):
            center_(each, batch(0))
        if shard:
            for layer in (model[0], model[2], model):
                fully_shard(layer)
        parallel = model if shard else DistributedDataParallel(model)
        optimizer, plain = (optimizer_of(each, grad_norm=0.1) for each in (parallel, single))
        for step in range(STEPS):
            x = batch(step)
            # Each rank measures its own half: the mean of the means is that of the whole batch.
            center_(parallel, own_part(x))
            center_(single, x)
            runs = (parallel, optimizer, own_part(x)), (single, plain, x)
            for run, each, part in runs:
                each.zero_grad()
                loss_of(run, part).backward()
                each.step()
        assert_near(model, single)
        for each, other in ((model[0], single[0]), (model[2], single[2])):
            assert (each.input_mean - other.input_mean).abs().max() <= 1e-6
        assert (model[0].input_mean - x.mean(dim=(0, 2, 3))).abs().max() <= 1e-6


class EitherWay(nn.Module):
    """Runs its convolutions in an order of each rank's own, or one of them alone."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.order = [0, 1, 2]

    def forward(self, x):
        return [self.convolutions[number](x + 10 * number) for number in self.order]


@on_both_ranks
def test_centered_in_another_order_on_each_rank():
    model = EitherWay()
    model.order = [[1, 0], [0, 1, 2]][dist.get_rank()]
    x = batch(0)
    assert center_(model, own_part(x)) == 3
    mean = x.mean(dim=(0, 2, 3))
    last = x.chunk(RANKS)[1].mean(dim=(0, 2, 3))
    for number, expected in enumerate((mean, mean + 10, last + 20)):
        assert (model.convolutions[number].input_mean - expected).abs().max() <= 1e-5


@on_both_ranks
def test_zero_redundancy():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, single = network(), network()
    parallel = DistributedDataParallel(model)
    # Of a bare model.parameters() it makes groups that set everything, `luma` too.
    optimizer = ZeroRedundancyOptimizer(czm_param_groups(model), FusedCZMSGD, **OPTIONS)
    plain = optimizer_of(single)
    for step in range(STEPS):
        optimizer.zero_grad()
        step_alike(parallel, optimizer, single, plain, batch(step))
    assert_near(model, single)


@on_both_ranks
def test_compiled_step_of_shards():
    model, twin = (fully_shard(nn.Conv2d(2, 3, 3)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer = optimizer_of(model, lr=torch.tensor(0.125))
    plain = optimizer_of(twin, lr=0.125)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        compiled()
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
