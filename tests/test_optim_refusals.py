"""What FusedCZMSGD refuses: a clear error, and nothing half-updated."""

import math

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD
from small_training import (
    CZM,
    assert_equal,
    backward,
    network,
    on_every_backend,
    weights,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be a finite number >= 0, but was -0.1"),
        ({"lr": NAN}, "lr must be .* but was nan"),
        ({"lr": INF}, "lr must be .* but was inf"),
        ({"lr": torch.tensor(-1.0)}, "lr must be .* but was -1.0"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a 0-d tensor, but was tensor"),
        ({"lr": "0.1"}, "lr must be a number"),
        ({"lr": None}, "lr must be a number"),
        ({"momentum": math.inf}, r"momentum must be a finite number >= 0, but was inf"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"momentum": NAN}, "momentum must be"),
        ({"dampening": 1.1}, r"dampening must be in \[0, 1\]"),
        ({"dampening": -0.1}, "dampening must be"),
        ({"dampening": NAN}, "dampening must be"),
        ({"weight_decay": -1e-4}, "weight_decay must be"),
        ({"weight_decay": NAN}, "weight_decay must be"),
        ({"zmg": 1.01}, r"zmg must be in \[0, 1\], but was 1.01"),
        ({"zmg": -0.1}, "zmg must be"),
        ({"zmg": NAN}, "zmg must be"),
        ({"luma": -1e-4}, "luma must be"),
        ({"luma": NAN}, "luma must be"),
        ({"nesterov": True}, "nesterov needs momentum > 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs .* dampening = 0"),
    ],
    ids=str,
)
def test_hyper_parameters_out_of_range_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FusedCZMSGD(network().parameters(), **options)

    model = network()
    optimizer = FusedCZMSGD([model[0].weight], lr=0.1)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group({"params": [model[0].bias], **options})
    assert len(optimizer.param_groups) == 1

    backward(model, 0)
    before = weights(model)
    for _ in range(2):
        optimizer.param_groups[0].update(options)
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.step()
        assert_equal(weights(model), before)
        # Once more on an optimizer that has made its plan.
        optimizer = FusedCZMSGD([model[0].weight], lr=0.1)
        optimizer.step()
        before = weights(model)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "parameter 1 is torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), "parameter 1 is torch.complex64"),
        (torch.eye(3).to_sparse(), "parameter 1 is torch.sparse_coo"),
        (torch.zeros(3, device="meta"), "on one device, but has cpu, meta"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(param, message):
    good = torch.zeros(3)
    with pytest.raises((TypeError, ValueError), match=message):
        FusedCZMSGD([good, param], lr=0.1)
    other = torch.zeros(2, requires_grad=True)
    optimizer = FusedCZMSGD([other], lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [good, param]})
    assert len(optimizer.param_groups) == 1
    # Nothing of the refused group is remembered.
    optimizer.add_param_group({"params": [good]})


@pytest.mark.parametrize("group", [[torch.zeros(3)], "params", 3])
def test_a_group_that_is_no_dictionary_is_refused(group):
    optimizer = FusedCZMSGD([torch.zeros(2)], lr=0.1)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(group)


def test_a_parameter_in_two_groups_is_refused():
    param = torch.zeros(3)
    optimizer = FusedCZMSGD([param], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_a_backend_that_cannot_run_is_refused():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run on cpu tensors"):
        FusedCZMSGD([torch.zeros(3)], lr=0.1, backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of auto, cpu.* 'gpu'"):
        FusedCZMSGD([torch.zeros(3)], lr=0.1, backend="gpu")


@on_every_backend
def test_sparse_gradients_are_refused_and_nothing_is_updated(backend):
    embedding, conv = nn.Embedding(5, 3, sparse=True), nn.Conv2d(3, 4, 3)
    params = [*conv.parameters(), *embedding.parameters()]
    optimizer = FusedCZMSGD(params, **CZM, backend=backend)
    before = [p.detach().clone() for p in params]
    conv(torch.ones(1, 3, 3, 3)).sum().backward()
    embedding(torch.tensor([1, 2])).sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gradient of parameter 2 is torch.sparse_coo"):
            optimizer.step()
        assert_equal([p.detach() for p in params], before)
    # And where a dense step has been made before.
    embedding.weight.grad = None
    optimizer.step()
    embedding.weight.grad = torch.zeros(5, 3)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    embedding.weight.grad = torch.eye(5, 3).to_sparse()
    with pytest.raises(RuntimeError, match="gradient of parameter 2 is torch.sparse_coo"):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)


def test_no_device_is_updated_if_another_has_a_bad_gradient():
    here = nn.Parameter(torch.ones(3))
    there = nn.Parameter(torch.ones(5, 3, device="meta"))
    optimizer = FusedCZMSGD([{"params": [here]}, {"params": [there]}], lr=0.1, backend="reference")
    here.grad = torch.ones(3)
    there.grad_dtype = None
    there.grad = torch.zeros(5, 3, device="meta", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gradient of parameter 1 is torch.float64"):
        optimizer.step()
    assert_equal(here.detach(), torch.ones(3))


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("wraps_first", [True, False])
def test_flattened_parameters_are_refused(use_orig_params, wraps_first, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.Conv2d(3, 4, 3)
        optimizer = None if wraps_first else FusedCZMSGD(model.parameters(), lr=0.1)
        device = torch.device("cpu")
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=device
        )
        if wraps_first:
            with pytest.raises(TypeError, match="fully_shard"):
                FusedCZMSGD(wrapped.parameters(), lr=0.1)
        elif use_orig_params:
            wrapped(torch.ones(1, 3, 8, 8)).sum().backward()
            with pytest.raises(TypeError, match="fully_shard"):
                optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_tensors_of_groups_are_their_own():
    lr = torch.tensor(0.4)
    groups = [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(2)]
    optimizer = FusedCZMSGD(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.1, lambda n: 0.5])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.04, 0.2])
    assert lr.item() == pytest.approx(0.4)


def test_groups_can_be_used_again():
    groups = [{"params": [nn.Parameter(torch.ones(3))]}]
    rates = [FusedCZMSGD(groups, lr=lr).param_groups[0]["lr"] for lr in (0.4, 0.2, 0.1)]
    assert rates == [0.4, 0.2, 0.1]
    assert set(groups[0]) == {"params"}
