"""State saved by torch.distributed.checkpoint on one number of processes, loaded on another."""

import copy

import pytest
import torch
from ranks import on_both_ranks
from torch import nn

from czm_fused import FusedCZMSGD, czm_param_groups
from small_training import assert_equal

pytest.importorskip("torch.distributed.tensor", exc_type=ImportError)
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

OPTIONS = {"lr": 0.1, "momentum": 0.9, "luma": 0.1, "dampening": 0.5}


def network(shards, dtype=torch.float32):
    """Return a network of 5 filters, which share unevenly, and of one, which leaves a rank none."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 1, 1), nn.Flatten(), nn.Linear(16, 3)
    ).to(dtype)
    return fully_shard(model) if shards else model


def optimizer_of(model, **options):
    return FusedCZMSGD(czm_param_groups(model), **{**OPTIONS, **options})


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, optimizer, begin, steps=2):
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = 0.1 * torch.randn(p.shape, generator=generator)
            p.grad = torch.zeros_like(p)
            place(p.grad, grad)
        optimizer.step()


def place(tensor, values):
    """Copy whole `values` into a tensor, or this rank's part of them into a DTensor."""
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values, tensor.device_mesh, tensor.placements, src_data_rank=None
        ).to_local()
        tensor = tensor.to_local()
    tensor.copy_(values)


def trained(shards, steps):
    model = network(shards)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, steps)
    return model, optimizer


def assert_same(model, optimizer, other, other_optimizer):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_equal(full(p.detach()), full(q.detach()))
        state, other_state = optimizer.state[p], other_optimizer.state[q]
        assert sorted(state) == sorted(other_state)
        for name, value in state.items():
            assert_equal(full(value), full(other_state[name]))


def save(folder, model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder, shards):
    model = network(shards)
    # The weights are not those that were saved, nor is the rate.
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = optimizer_of(model, lr=7.0)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
    return model, optimizer


def save_on_two(folder):
    save(folder, *trained(True, 2))


def load_on_two(folder):
    model, optimizer = load(folder, shards=True)
    assert_same(model, optimizer, *trained(False, 4))
    train(model, optimizer, 4)
    assert_same(model, optimizer, *trained(False, 6))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_two_processes_to_one_to_two(ranks, tmp_path):
    ranks.run(save_on_two, tmp_path / "two")
    model, optimizer = load(tmp_path / "two", shards=False)
    assert_same(model, optimizer, *trained(False, 2))
    train(model, optimizer, 2)
    save(tmp_path / "one", model, optimizer)
    ranks.run(load_on_two, tmp_path / "one")


@on_both_ranks
def test_state_is_gathered_offloaded_broadcast_and_flattened():
    expected, later = trained(False, 2), trained(False, 4)
    for how, how_back in (
        ({"full_state_dict": True}, {"full_state_dict": True}),
        (
            {"full_state_dict": True, "cpu_offload": True},
            {"full_state_dict": True, "broadcast_from_rank0": True},
        ),
        ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    ):
        model, optimizer = trained(True, 2)
        options = StateDictOptions(**how)
        model_state = get_model_state_dict(model, options=options)
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
        if options.cpu_offload and dist.get_rank() == 1:
            assert not optimizer_state
        other, other_optimizer = trained(True, 1)
        options = StateDictOptions(**how_back)
        set_model_state_dict(other, model_state, options=options)
        set_optimizer_state_dict(other, other_optimizer, optimizer_state, options=options)
        assert_same(other, other_optimizer, *expected)
        train(other, other_optimizer, 2)
        assert_same(other, other_optimizer, *later)


@on_both_ranks
def test_asking_a_fresh_optimizer_for_its_state_changes_no_weight():
    model = network(True)
    before = [full(p.detach()).clone() for p in model.parameters()]
    optimizer = optimizer_of(model, weight_decay=0.1)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state["0.weight"]["log_scale"].shape == (5,)
    assert_equal([full(p.detach()) for p in model.parameters()], before)
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)


@on_both_ranks
def test_a_shards_state_loads_under_another_dtype_and_backend():
    for dtype, other_dtype in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        model = network(True, dtype)
        optimizer = optimizer_of(model, backend="reference")
        train(model, optimizer, 0)
        other = network(True, other_dtype)
        other_optimizer = optimizer_of(other, lr=7.0)
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for name, value in optimizer.state[p].items():
                loaded = other_optimizer.state[q][name]
                cast = value.to(other_dtype) if name == "momentum_buffer" else value
                assert_equal(full(loaded), full(cast))
        train(other, other_optimizer, 2)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_parameters_in_another_order_get_their_own_state():
    """Parameters come in the optimizer's order then, and their names in that which was saved."""

    def made(*names):
        model = nn.Module()
        for name in names:
            model.register_parameter(name, nn.Parameter(torch.zeros(2)))
        return model, FusedCZMSGD(model.named_parameters(), **OPTIONS)

    model, optimizer = made("a", "b")
    model.a.grad, model.b.grad = torch.ones(2), torch.full((2,), 2.0)
    optimizer.step()
    other, other_optimizer = made("b", "a")
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(other, other_optimizer, state)
    for name in ("a", "b"):
        ours, theirs = other.get_parameter(name), model.get_parameter(name)
        assert_equal(other_optimizer.state[ours], optimizer.state[theirs])
    assert other_optimizer.param_groups[0]["param_names"] == ["b", "a"]
