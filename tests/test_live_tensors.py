"""Steps whose tensors change between two of them: every address is read from the live tensors."""

import gc
import random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from czm_fused import FusedCZMSGD
from czm_fused.ops.step import tensors
from small_training import on_every_backend

PLAIN = {"zmg": 0.0, "luma": 0.0, "exp_scale": False}


def twins(*shapes, backend="auto", **options):
    """Return an optimizer and torch.optim.SGD over parameters of equal values."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    return (
        FusedCZMSGD(ours, backend=backend, **PLAIN, **options),
        torch.optim.SGD(theirs, **options),
    )


def step(optimizers, seed=0):
    """Give both optimizers the same random gradients and step them."""
    for optimizer in optimizers:
        generator = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()


def assert_alike(optimizers):
    ours, theirs = (
        [p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers
    )
    for p, q in zip(ours, theirs, strict=True):
        # A handful of float32 roundings a step.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_native", [True, False])
def test_gradients_and_state_are_found_in_any_order(is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(tensors, "native_module", lambda: None)
    elif tensors.native_module() is None:
        pytest.skip("the native cpu module is not built")

    class WithGradOfItsOwn(nn.Parameter):
        grad = 3

    params = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
    params.insert(2, WithGradOfItsOwn(torch.zeros(1)))
    for p in params[:2]:
        p.grad = torch.ones(1)
    for order in ([0, 1, 2, 3, 4, 5], [0, 2, 3], [5, 4, 1, 0], []):
        state = {params[n]: {"step": n} for n in order}
        grads, states = tensors.find_tensors(params, state)
        expected = [params[0].grad, params[1].grad, 3, None, None, None]
        assert all(a is b for a, b in zip(grads, expected, strict=True))
        assert all(a is state.get(p) for a, p in zip(states, params, strict=True))


@pytest.mark.parametrize(
    "sample",
    [
        torch.empty(0),
        torch.empty([1] * 6),
        torch.empty(()),
        nn.Parameter(torch.empty(2)),
        torch.empty(2, device="meta"),
    ],
)
@pytest.mark.parametrize("storage", ["its own", 0, 1, 2**64 - 8])
def test_whatever_is_learned_of_records(sample, storage, monkeypatch):
    if tensors.native_module() is None:
        pytest.skip("the native cpu module is not built")
    if storage == "its own":
        storage = sample.untyped_storage()._cdata
    objects = (*tensors._torch_objects()[:-2], sample, storage)
    monkeypatch.setattr(tensors, "_torch_objects", lambda: objects)
    # More tensors than are fetched at once, some with sizes outside their records.
    optimizers = twins(*[[3, 2]] * 90, *[[2, 1, 1, 1, 1, 3]] * 10, momentum=0.9)
    for seed in range(3):
        step(optimizers, seed)
    assert_alike(optimizers)


class Replacing(TorchFunctionMode):
    """Replace every momentum buffer when a step first asks for a negative bit."""

    def __init__(self, states):
        super().__init__()
        self.states = states
        self.replaced = []
        self.are_alive = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.is_neg:
            self.are_alive += [each() is not None for each in self.replaced]
            if not self.replaced:
                for state in self.states:
                    self.replaced.append(weakref.ref(state["momentum_buffer"]))
                    # Of the same memory, which the step may go on to write to.
                    state["momentum_buffer"] = state["momentum_buffer"].detach()
        return function(*args, **(kwargs or {}))


def test_tensors_are_held_while_python_runs_between_reading_two():
    if tensors.native_module() is None:
        pytest.skip("the native cpu module is not built")
    optimizers = twins([3, 2], [2], [5], momentum=0.9)
    step(optimizers)
    ours, _ = optimizers
    mode = Replacing([ours.state[p] for p in ours.param_groups[0]["params"]])
    with mode:
        step(optimizers, seed=1)
    assert mode.are_alive and all(mode.are_alive)
    step(optimizers, seed=2)
    assert_alike(optimizers)


@on_every_backend
def test_gradients_with_a_negative_bit(backend):
    w = nn.Parameter(torch.tensor([0.5]))
    optimizer = FusedCZMSGD([w], lr=0.1, backend=backend)
    for expected in (0.7, 0.9, 1.1):
        optimizer.zero_grad()
        (torch.complex(torch.ones(1), w).conj() * (2 + 3j)).imag.sum().backward()
        optimizer.step()
        assert w.item() == pytest.approx(expected, abs=1e-6)


@on_every_backend
def test_state_with_a_negative_bit(backend):
    optimizers = twins((4, 3), (7,), lr=0.1, momentum=0.9, backend=backend)
    step(optimizers)
    state = optimizers[0].state
    p = optimizers[0].param_groups[0]["params"][0]
    buffer = state[p]["momentum_buffer"]
    state[p]["momentum_buffer"] = torch._neg_view(-buffer)
    step(optimizers, 1)
    step(optimizers, 2)
    assert_alike(optimizers)


@on_every_backend
def test_parameters_exchanged_between_groups(backend):
    a, b = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = FusedCZMSGD(
        [{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.001}], lr=1.0, backend=backend, **PLAIN
    )
    for p in (a, b):
        p.grad = torch.ones(3)
    optimizer.step()
    groups = optimizer.param_groups
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((3,), -1.001))
    torch.testing.assert_close(b.detach(), torch.full((3,), -1.001))


def share(state):
    state["momentum_buffer"].share_memory_()


def resize(state):
    buffer = state["momentum_buffer"]
    values, size = buffer.clone(), buffer.untyped_storage().nbytes()
    buffer.untyped_storage().resize_(0)
    buffer.untyped_storage().resize_(size)
    buffer.copy_(values)


def set_(state):
    state["momentum_buffer"].set_(state["momentum_buffer"].clone())


def set_data(state):
    state["momentum_buffer"].data = state["momentum_buffer"].clone()


@on_every_backend
@pytest.mark.parametrize("move", [share, resize, set_, set_data])
def test_state_moved_where_it_is(move, backend):
    optimizers = twins((5, 4), (6, 3), (7,), lr=0.1, momentum=0.9, backend=backend)
    step(optimizers)
    ours = optimizers[0]
    move(ours.state[ours.param_groups[0]["params"][1]])
    step(optimizers, 1)
    step(optimizers, 2)
    assert_alike(optimizers)


@on_every_backend
@pytest.mark.parametrize("what", ["param", "grad", "state"])
@pytest.mark.parametrize("offset", [0, 8])
def test_storage_resized_to_nothing_is_refused(what, offset, backend):
    p, other = nn.Parameter(torch.ones(32)[offset : offset + 8]), nn.Parameter(torch.ones(3))
    optimizer = FusedCZMSGD([other, p], lr=0.1, momentum=0.9, backend=backend)
    for q in (p, other):
        q.grad = torch.ones(32)[offset : offset + q.numel()]
    optimizer.step()
    tensor = {"param": p, "grad": p.grad, "state": optimizer.state[p].get("momentum_buffer")}[what]
    if what == "state":
        tensor.set_(torch.ones(32)[offset : offset + 8])
    before = other.detach().clone()
    tensor.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match="has no memory"):
        optimizer.step()
    assert torch.equal(other, before)


def test_memory_is_freed_at_once():
    (ours, _) = twins((50, 4), (60,), lr=0.1, momentum=0.9)
    step([ours])
    p = ours.param_groups[0]["params"][0]
    storage = weakref.ref(p.untyped_storage())
    buffer = weakref.ref(ours.state[p]["momentum_buffer"])
    p.data = torch.empty(0)
    p.grad = None
    ours.state[p]["momentum_buffer"] = torch.empty(0)
    gc.collect()
    assert storage() is None and buffer() is None


def test_two_threads():
    params = [nn.Parameter(torch.zeros(64)) for _ in range(20)]
    optimizer = FusedCZMSGD(params, lr=1e-3, **PLAIN)
    for p in params:
        p.grad = torch.ones(64)
    optimizer.step()
    threads = [
        threading.Thread(target=lambda: [optimizer.step() for _ in range(100)]) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for p in params:
        # Updates of one weight by two threads may be lost, but never go astray.
        assert (-0.2011 <= p).all() and (p <= -0.1).all()


def _transpose(optimizer, p, draw):
    if p.dim() == 2 and p.shape[0] == p.shape[1]:
        p.data = p.data.t()


def _move(optimizer, p, draw):
    p.data = p.data.clone()


def _slice(optimizer, p, draw):
    if p.dim():
        p.data = torch.stack([p.data, p.data], dim=-1)[..., draw.randrange(2)]


def _replace_state(optimizer, p, draw):
    state = optimizer.state[p]
    if state.get("momentum_buffer") is not None:
        state["momentum_buffer"] = state["momentum_buffer"].clone()


def _move_state(optimizer, p, draw):
    state = optimizer.state[p]
    if state.get("momentum_buffer") is not None:
        state["momentum_buffer"].data = state["momentum_buffer"].clone()


def _forget(optimizer, p, draw):
    optimizer.state.pop(p, None)


def _change_rate(optimizer, p, draw):
    draw.choice(optimizer.param_groups)["lr"] = draw.choice([0.1, 0.01, torch.tensor(0.05)])


def _reload(optimizer, p, draw):
    optimizer.load_state_dict(optimizer.state_dict())


def _regroup(optimizer, p, draw):
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]


CHANGES = [
    _transpose, _move, _slice, _replace_state, _move_state, _forget, _change_rate, _reload, _regroup
]  # fmt: skip


@on_every_backend
@pytest.mark.parametrize("seed", range(20))
def test_any_changes_between_steps(seed, backend):
    """Both optimizers meet the same changes, and must remain alike."""
    if backend != "reference":
        backend = "auto"
    shapes = [(4, 4), (3, 2, 3, 3), (5,), (), (6, 6), (2, 3)]
    ours, theirs = twins(*shapes, lr=0.1, momentum=0.9, backend=backend)
    for optimizer in (ours, theirs):
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = params[:3]
        optimizer.add_param_group({"params": params[3:], "lr": 0.02})
    draw = random.Random(seed)
    for number in range(12):
        change, index, twin_seed = draw.choice(CHANGES), draw.randrange(6), draw.random()
        for optimizer in (ours, theirs):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            change(optimizer, params[index], random.Random(twin_seed))
        without = draw.sample(range(6), draw.randrange(3))
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(params):
                values = torch.randn(p.shape, generator=generator)
                p.grad = None if i in without else torch.empty_like(p).copy_(values)
            optimizer.step()
        assert_alike((ours, theirs))
