"""FusedCZMSGD's state saved, loaded and copied; GradScaler."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from czm_fused import FusedCZMSGD
from czm_fused.ops.step import reference
from small_training import (
    CZM,
    PLAIN,
    assert_equal,
    backward,
    network,
    on_every_backend,
    same_memory_order,
    state_of,
    train,
    weights,
)


def by_state_dict(optimizer, model):
    other = FusedCZMSGD(model.parameters(), lr=7.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def by_file(optimizer, model):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = FusedCZMSGD(model.parameters(), lr=7.0, zmg=0.1)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def by_pickle(optimizer, model):
    params, optimizer = pickle.loads(pickle.dumps((list(model.parameters()), optimizer)))
    _adopt(model, params)
    return optimizer


def by_deepcopy(optimizer, model):
    params, optimizer = copy.deepcopy((list(model.parameters()), optimizer))
    _adopt(model, params)
    return optimizer


def _adopt(model, params):
    names = [name for name, _ in model.named_parameters()]
    for name, param in zip(names, params, strict=True):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, param)


@pytest.mark.parametrize("carry", [by_state_dict, by_file, by_pickle, by_deepcopy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"dampening": 0.5, "luma": 0.1}])
def test_training_continues_bit_for_bit(options, layout, dtype, carry):
    model = network(dtype=dtype).to(memory_format=layout)
    optimizer = FusedCZMSGD(model.parameters(), **CZM, **options)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    if carry in (by_pickle, by_deepcopy):
        twin = model.__class__(*copy.deepcopy(list(model)))
        other = carry(optimizer, model)
        model, twin = twin, model
        optimizer = by_state_dict(optimizer, model)
    else:
        other = carry(optimizer, twin)
    assert_equal(state_of(other), state_of(optimizer))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a is not b
    train(model, optimizer, 3, begin=3)
    train(twin, other, 3, begin=3)
    assert_equal(weights(twin), weights(model))
    assert_equal(state_of(other), state_of(optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_keeps_log_scales_exact(dtype):
    model = network(dtype=dtype)
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    train(model, optimizer, 3)
    other = by_file(optimizer, copy.deepcopy(model))
    for a, b in zip(state_of(optimizer), state_of(other), strict=True):
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name])


def test_loading_takes_the_present_layout_and_dtype():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    train(model, optimizer, 2)
    twin = network(dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    other = by_state_dict(optimizer, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        buffer = other.state[q]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16 and same_memory_order(buffer, q)
        assert torch.equal(buffer, optimizer.state[p]["momentum_buffer"].to(torch.bfloat16))
        if p.dim() > 2:
            assert_equal(other.state[q]["log_scale"], optimizer.state[p]["log_scale"])
    train(twin, other, 1)


def test_loading_a_state_of_torch_sgd():
    model, twin = network(), network()
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, foreach=False)
    train(twin, sgd, 3)
    model.load_state_dict(twin.state_dict())
    optimizer = FusedCZMSGD(model.parameters(), luma=0.125)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["zmg"], group["luma"]) == (0.05, 0.9, 0.85, 0.125)
    expected = {p: reference.initial_log_scale(p.detach()) for p in model.parameters()
                if p.dim() > 2}
    group["lr"] = 0.0
    train(model, optimizer, 1)
    for p, log_scale in expected.items():
        assert torch.equal(optimizer.state[p]["log_scale"], log_scale)


def test_sgds_state_continues_as_sgd():
    model, twin = network(), network()
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, dampening=0.5, foreach=False)
    train(twin, sgd, 3)
    model.load_state_dict(twin.state_dict())
    optimizer = FusedCZMSGD(model.parameters(), **PLAIN)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    train(model, optimizer, 3, begin=3)
    train(twin, sgd, 3, begin=3)
    # 3 steps of some 10 roundings of numbers below 1.
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert ((a - b).abs() <= 3 * 10 * torch.finfo(torch.float32).eps).all()


def test_sgds_state_without_momentum():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, sgd, 1)
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    optimizer.load_state_dict(sgd.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, 1)
    for p in model.parameters():
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape


def test_older_dictionaries_keep_the_present_values():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    saved = optimizer.state_dict()
    for name in ("zmg", "luma", "grad_norm", "exp_scale", "maximize", "min_filter_dim"):
        del saved["param_groups"][0][name]
    group = {"params": model.parameters(), "luma": 0.5, "grad_norm": 0.1, "exp_scale": False}
    other = FusedCZMSGD([group], zmg=0.25)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["zmg"], group["luma"], group["exp_scale"]) == (0.25, 0.5, False)
    assert group["grad_norm"] == 0.1
    assert (group["min_filter_dim"], group["maximize"]) == (2, False)
    assert group["momentum"] == 0.9
    train(model, other, 1)


def test_a_dictionary_of_another_network_is_refused():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    train(model, optimizer, 1)
    before = state_of(optimizer)
    other = FusedCZMSGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other.state_dict())
    assert_equal(state_of(optimizer), before)


def value_at(dictionary, path, value):
    """Return a copy of a nested dictionary with another value at `path`; None there deletes it."""
    dictionary = copy.deepcopy(dictionary)
    inner = dictionary
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return dictionary


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("state",), None, "state_dict must have 'state'"),
        (("state",), [1], "state_dict must have 'state', but it was a list"),
        (("param_groups",), "none", "state_dict must have 'param_groups', but it was a str"),
        (("param_groups", 0), [0], "group 0 of state_dict must be a dictionary"),
        (("param_groups", 0, "params"), 3, "group 0 of state_dict must be a dictionary"),
        (("param_groups", 0, "lr"), "0.1", "lr must be a number or a 0-d tensor, but was '0.1'"),
        (("param_groups", 0, "lr"), -1.0, "lr must be a finite number >= 0"),
        (("param_groups", 0, "momentum"), [0.9], "momentum must be a number"),
        (("param_groups", 0, "zmg"), torch.ones(2), "zmg must be a number"),
        (("param_groups", 0, "nesterov"), "no", "nesterov must be a number"),
        (("param_groups", 0, "exp_scale"), "no", "exp_scale must be True or False, but was 'no'"),
        (("param_groups", 0, "master_weights"), 0.5, "master_weights must be True or False"),
        (("param_groups", 0, "min_filter_dim"), "3", "min_filter_dim must be a number of dim"),
        (("param_groups", 0, "max_filter_dim"), 3.5, "max_filter_dim must be a number of dim"),
        (("state", 0), 7, "the state of parameter 0 must be a dictionary, but was a int"),
        (("state", 0, "momentum_buffer"), [0.0], "momentum_buffer of parameter 0 must be a tensor"),
        (("state", 0, "log_scale"), "g", "log_scale of parameter 0 must be a tensor"),
        (("state", 0, "log_scale"), torch.ones(4), "log_scale of parameter 0 must have shape"),
        (("state", 0, "log_scale"), torch.ones(5) * 1j, "log_scale of parameter 0 must be dense"),
        (
            ("state", 2, "momentum_buffer"),
            torch.ones(4, 5, 1, 1).to_sparse(),
            "momentum_buffer of parameter 2 must be dense and real",
        ),
        (("state", 0, "step"), "first", "step of parameter 0 must be a tensor, but was a str"),
    ],
)
def test_a_dictionary_of_wrong_values_is_refused_whole(path, value, message):
    model, twin = network(), network()
    optimizer, other = (
        FusedCZMSGD(m.parameters(), **CZM, dampening=0.5) for m in (model, twin)
    )
    train(model, optimizer, 1)
    train(twin, other, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(value_at(other.state_dict(), path, value))
    assert "\n" not in str(error.value)
    assert_equal(optimizer.state_dict(), before)
    train(model, optimizer, 1, begin=1)
    assert_equal(weights(model), weights(twin))


@pytest.mark.parametrize("fused", [None, False, True])
def test_copies_keep_their_backend_and_amp_contract(fused):
    optimizer = FusedCZMSGD(network().parameters(), **CZM, backend="reference", fused=fused)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.backend == "reference"
        assert other._step_supports_amp_scaling is (fused is True)
        assert other.param_groups[0]["zmg"] == 0.85


# --- GradScaler -----------------------------------------------------------------------------------


def scaled_backward(model, scaler, seed, infinite=False):
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(x).square().mean()
    scaler.scale(loss * float("inf") if infinite else loss).backward()


@on_every_backend
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}])
def test_grad_scaler_skips_without_a_trace(options, fused, backend):
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, **options, backend=backend, fused=fused)
    plain = FusedCZMSGD(twin.parameters(), **CZM, **options, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # The first step, and a later one, meet an infinity.
    for seed, infinite in enumerate((True, False, False, True, False)):
        scaled_backward(model, scaler, seed, infinite)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            assert_equal(weights(model), before)
        else:
            backward(twin, seed)
            plain.step()
            # A power of two scales exactly.
            assert_equal(weights(model), weights(twin))
            assert_equal(state_of(optimizer), state_of(plain))
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@on_every_backend
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_with_unscaling_and_clipping(fused, backend):
    model, twin = network(), network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, backend=backend, fused=fused)
    plain = FusedCZMSGD(twin.parameters(), **CZM, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed, infinite in enumerate((True, False, False)):
        scaled_backward(model, scaler, seed, infinite)
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        if not infinite:
            backward(twin, seed)
            clip_grad_norm_(twin.parameters(), 0.01)
            plain.step()
        assert_equal(weights(model), weights(twin))


def test_grad_scaler_without_any_gradient():
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM)
    # As GradScaler leaves them where it met no gradient.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), 0
    before = weights(model)
    optimizer.step()
    assert_equal(weights(model), before)


@on_every_backend
def test_grad_scaler_with_half_parameters(backend):
    model = network(dtype=torch.bfloat16)
    optimizer = FusedCZMSGD(model.parameters(), **CZM, backend=backend)
    twin = network(dtype=torch.bfloat16)
    plain = FusedCZMSGD(twin.parameters(), **CZM, backend=backend)
    for seed in range(3):
        backward(model, seed)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad, p.grad = p.grad, p.grad * 256
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(256.0), torch.tensor(0.0)
        optimizer.step()
        plain.step()
        assert_equal(weights(model), weights(twin))
