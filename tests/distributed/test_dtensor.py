"""FusedCZMSGD on DTensors: the bits of a single process, and clear errors for what cannot be."""

import copy
import pickle

import pytest
import torch
from ranks import on_both_ranks
from torch import nn

from czm_fused import FusedCZMSGD
from small_training import BACKENDS, PLAIN, assert_equal

pytest.importorskip("torch.distributed.tensor", exc_type=ImportError)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402

# Shards of 3 and 2 filters, of 1 and none, and of none at all.
SHAPES = ((5, 3, 3, 3), (1, 4, 1, 1), (0, 2, 3, 3), (7,), (4, 6, 3))
OPTIONS = {"lr": 0.1, "momentum": 0.9, "luma": 0.1, "weight_decay": 0.01}


def mesh(*shape):
    return init_device_mesh("cpu", shape)


def distribute(tensor, mesh, placements):
    # Replicate() would keep the memory itself.
    return distribute_tensor(tensor.clone(), mesh, placements)


def pair(mesh, placements, shapes=SHAPES, dtype=torch.float32):
    """Return the same parameters whole and as DTensors."""
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    parts = [nn.Parameter(distribute(p.detach(), mesh, placements)) for p in whole]
    return whole, parts


def set_grads(whole, parts):
    for p, q in zip(whole, parts, strict=True):
        p.grad = (0.1 * torch.randn(p.shape)).to(p.dtype)
        is_dtensor = isinstance(q, DTensor)
        q.grad = distribute(p.grad, q.device_mesh, q.placements) if is_dtensor else p.grad.clone()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(whole, single, parts, sharded):
    for p, q in zip(whole, parts, strict=True):
        assert_equal(full(q.detach()), p.detach())
        assert list(sharded.state[q]) == list(single.state[p])
        for name, value in sharded.state[q].items():
            assert_equal(full(value), single.state[p][name])
            if isinstance(q, DTensor) and name != "step":
                assert (value.device_mesh, value.placements) == (q.device_mesh, q.placements)


def step_alike(whole, single, parts, sharded):
    """Three steps of the parameters and of their parts, by the same gradients."""
    for _ in range(3):
        set_grads(whole, parts)
        single.step()
        sharded.step()


@on_both_ranks
def test_a_sharded_step_has_the_bits_of_the_whole():
    for shape, placements, dtype, options in (
        ((2,), [Shard(0)], torch.float32, {}),
        ((2,), [Shard(0)], torch.bfloat16, {"nesterov": True}),
        ((2,), [Shard(0)], torch.float64, {"dampening": 0.5}),
        ((2,), [Replicate()], torch.float32, {}),
        ((1, 2), [Replicate(), Shard(0)], torch.float32, {}),
        ((2, 1), [Shard(0), Shard(0)], torch.float32, {}),
    ):
        for backend in BACKENDS:
            whole, parts = pair(mesh(*shape), placements, dtype=dtype)
            single = FusedCZMSGD(whole, **OPTIONS, **options, backend=backend)
            sharded = FusedCZMSGD(parts, **OPTIONS, **options, backend=backend)
            step_alike(whole, single, parts, sharded)
            assert_same(whole, single, parts, sharded)


@on_both_ranks
def test_filters_dealt_out_in_strides():
    # As fully_shard after tensor parallelism; torch wants them to share evenly.
    placements = [_StridedShard(0, split_factor=1), Shard(0)]
    whole, parts = pair(mesh(2, 1), placements, ((4, 3, 3, 3), (8,)))
    single, sharded = FusedCZMSGD(whole, **OPTIONS), FusedCZMSGD(parts, **OPTIONS)
    step_alike(whole, single, parts, sharded)
    assert_same(whole, single, parts, sharded)


@on_both_ranks
def test_plain_tensors_beside_dtensors():
    whole, parts = pair(mesh(2), [Shard(0)])
    parts[1:3] = [nn.Parameter(p.detach().clone()) for p in whole[1:3]]
    single, sharded = FusedCZMSGD(whole, **OPTIONS), FusedCZMSGD(parts, **OPTIONS)
    step_alike(whole, single, parts, sharded)
    assert_same(whole, single, parts, sharded)


@on_both_ranks
def test_what_is_no_filter_may_be_split_anyhow():
    for placement in (Shard(0), Shard(1), Shard(2)):
        shapes = ((5, 3, 3), (2, 7, 4))
        whole, parts = pair(mesh(2), [placement], shapes)
        single = FusedCZMSGD(whole, lr=0.1, momentum=0.9, **PLAIN)
        sharded = FusedCZMSGD(parts, lr=0.1, momentum=0.9, **PLAIN)
        for _ in range(2):
            set_grads(whole, parts)
            single.step()
            sharded.step()
        assert_same(whole, single, parts, sharded)
        if placement != Shard(0):
            # And when it becomes one later.
            before = [full(p.detach()) for p in parts]
            sharded.param_groups[0]["luma"] = 0.1
            with pytest.raises(ValueError, match="parameter 0 has placements .*whole filters"):
                sharded.step()
            assert_equal([full(p.detach()) for p in parts], before)


@on_both_ranks
def test_placements_that_cut_filters_are_refused():
    good = nn.Parameter(distribute(torch.ones(4, 4, 3, 3), mesh(2), [Shard(0)]))
    cut = nn.Parameter(distribute(torch.ones(4, 4, 3, 3), mesh(2), [Shard(1)]))
    message = r"parameter 1 has placements .*Shard\(dim=1\).*place it by Shard\(0\)"
    with pytest.raises(ValueError, match=message):
        FusedCZMSGD([good, cut], lr=0.1)
    optimizer = FusedCZMSGD([good], lr=0.1)
    with pytest.raises(ValueError, match="parameter 0 has placements"):
        optimizer.add_param_group({"params": [cut]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [cut], **PLAIN})

    summand = DTensor.from_local(torch.ones(3), mesh(2), [Partial()], run_check=False)
    with pytest.raises(ValueError, match="still to be made; redistribute"):
        FusedCZMSGD([nn.Parameter(summand)], lr=0.1, **PLAIN)


@on_both_ranks
def test_plain_gradients_of_dtensors_are_refused():
    whole, parts = pair(mesh(2), [Shard(0)], ((4, 3, 3, 3), (4, 3)))
    optimizer = FusedCZMSGD(parts, **OPTIONS)
    for _ in range(2):
        set_grads(whole, parts)
        before = [full(p.detach()).clone() for p in parts]
        parts[1].grad = None
        parts[1].grad = torch.ones(4, 3)
        with pytest.raises(RuntimeError, match="gradient of parameter 1 is a plain tensor"):
            optimizer.step()
        assert_equal([full(p.detach()) for p in parts], before)
        set_grads(whole, parts)
        optimizer.step()


@on_both_ranks
def test_gradients_placed_otherwise_are_redistributed():
    """As torch.optim.SGD does: sums that are still to be made above all."""
    whole, parts = pair(mesh(2), [Shard(0)], ((4, 3, 3, 3), (4, 3), (4,)))
    optimizer, single = (FusedCZMSGD(each, **OPTIONS) for each in (parts, whole))
    for number in range(3):
        set_grads(whole, parts)
        for p, q in zip(whole[number:], parts[number:], strict=True):
            placements = [Replicate()] if number == 1 else [Partial()]
            share = p.grad if number == 1 else p.grad / 2
            q.grad = DTensor.from_local(share.clone(), q.device_mesh, placements)
        optimizer.step()
        single.step()
        assert_same(whole, single, parts, optimizer)


@on_both_ranks
def test_downsampling_convolution():
    """As torch's test of that name: replicated weights, images that are split over the ranks."""
    for dim in (0, 3):
        for options in (PLAIN, {"momentum": 0.9}):
            check_downsampling_convolution(dim, options)


def check_downsampling_convolution(dim, options):
    torch.manual_seed(0)
    single = nn.Conv2d(3, 8, 4, stride=4)
    sharded = copy.deepcopy(single)

    def replicate(name, module, device_mesh):
        for key, param in module.named_parameters():
            whole = distribute(param.detach(), device_mesh, [Replicate()])
            module.register_parameter(key, nn.Parameter(whole))

    sharded = distribute_module(sharded, mesh(2), replicate)
    optimizers = [FusedCZMSGD(m.parameters(), lr=0.1, **options) for m in (single, sharded)]
    for _ in range(4):
        images, grads = torch.rand(4, 3, 16, 32), 1e-2 * torch.rand(4, 8, 4, 8)
        for optimizer in optimizers:
            optimizer.zero_grad()
        images, grads = (distribute_tensor(x, mesh(2), [Shard(dim)]) for x in (images, grads))
        sharded(images).backward(grads)
        # Of its convolutions, whose gradients are not the single one's in torch 2.13.
        for p, q in zip(single.parameters(), sharded.parameters(), strict=True):
            p.grad = q.grad.full_tensor().clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(single.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.to_local(), p)


@on_both_ranks
def test_parts_that_move_are_noticed():
    whole, parts = pair(mesh(2), [Shard(0)])
    single, sharded = FusedCZMSGD(whole, **OPTIONS), FusedCZMSGD(parts, **OPTIONS)
    for change in (
        # As FSDP does after a conversion of the module.
        lambda p: setattr(p, "_local_tensor", p._local_tensor.clone()),
        lambda p: sharded.state[p].update(
            momentum_buffer=sharded.state[p]["momentum_buffer"].clone()
        ),
        lambda p: p,
    ):
        set_grads(whole, parts)
        single.step()
        sharded.step()
        for p in parts:
            change(p)
    set_grads(whole, parts)
    single.step()
    sharded.step()
    assert_same(whole, single, parts, sharded)


@on_both_ranks
def test_step_bumps_the_versions_of_the_parts():
    _, (param,) = pair(mesh(2), [Shard(0)], ((4, 3, 3, 3),))
    optimizer = FusedCZMSGD([param], **OPTIONS)
    param.grad = torch.ones_like(param)
    versions = param._version, param.to_local()._version
    optimizer.step()
    assert param._version > versions[0]
    assert param._local_tensor._version > versions[1]


@on_both_ranks
def test_a_whole_state_is_cut_by_the_ranks_that_load_it():
    whole, parts = pair(mesh(2), [Shard(0)], dtype=torch.bfloat16)
    options = {**OPTIONS, "dampening": 0.5}
    single, sharded = FusedCZMSGD(whole, **options), FusedCZMSGD(parts, **options)
    for p in whole:
        p.grad = torch.randn(p.shape).to(p.dtype)
    single.step()
    for p, q in zip(whole, parts, strict=True):
        q.data.copy_(distribute(p.detach(), q.device_mesh, q.placements))
    sharded.load_state_dict(copy.deepcopy(single.state_dict()))
    assert_same(whole, single, parts, sharded)
    set_grads(whole, parts)
    single.step()
    sharded.step()
    assert_same(whole, single, parts, sharded)

    # The parts alone do not tell the whole.
    replicated = [nn.Parameter(distribute(p.detach(), mesh(2), [Replicate()])) for p in whole]
    for other in (single, FusedCZMSGD(replicated, **options)):
        before = pickle.dumps(other.state_dict()["param_groups"])
        with pytest.raises(ValueError, match="momentum_buffer is a DTensor .*get_optimizer_state"):
            other.load_state_dict(sharded.state_dict())
        assert pickle.dumps(other.state_dict()["param_groups"]) == before


@on_both_ranks
def test_copies_of_a_sharded_optimizer():
    whole, parts = pair(mesh(2), [Shard(0)])
    single, sharded = FusedCZMSGD(whole, **OPTIONS), FusedCZMSGD(parts, **OPTIONS)
    set_grads(whole, parts)
    single.step()
    sharded.step()
    parts, sharded = copy.deepcopy((parts, sharded))
    set_grads(whole, parts)
    single.step()
    sharded.step()
    assert_same(whole, single, parts, sharded)
