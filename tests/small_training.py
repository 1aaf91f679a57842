"""A small network, and a few steps of training it: what the optimizer's tests share."""

import pytest
import torch
from torch import nn

from czm_fused.ops.step.tensors import matching_strides

BACKENDS = ["reference"]
try:
    import czm_fused._C_cpu  # noqa: F401

    BACKENDS.append("cpu")
except ImportError:
    pass

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
PLAIN = {"zmg": 0.0, "luma": 0.0, "exp_scale": False}
CZM = {"lr": 0.1, "momentum": 0.9}


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    ).to(dtype)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 3, 6, 6, generator=generator).to(dtype)
    model.zero_grad()
    loss = model(x).float().square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, begin=0):
    for seed in range(begin, begin + steps):
        backward(model, seed)
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def state_of(optimizer):
    return [
        {name: value.clone() for name, value in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def same_memory_order(a, b):
    """Return True if two tensors of one shape have their elements in the same order in memory."""
    return matching_strides(a.shape, a.stride(), b.stride())
