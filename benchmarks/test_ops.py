"""Micro-benchmarks of the operators: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from throughput.models import make_grads, make_weights
from throughput.providers import FusedCZM, Settings, TorchSGD, available_backends
from throughput.timing import synchronizer
from torch import Tensor

from czm_fused.functional import add_relu_noise
from czm_fused.ops import exp_scale
from czm_fused.ops.backends import choose

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LAYERS = [(16, 16, 3, 3), (64, 64, 3, 3), (512, 512, 3, 3), (256, 64, 1, 1), (64, 3, 7, 7)]
ACTIVATIONS = [(128, 16, 32, 32), (128, 64, 8, 8)]
SETTINGS = Settings(lr=1e-6, luma=5e-4)
AMPLITUDE = 0.1


def _time(benchmark, device: str, call: Callable[[], object]) -> None:
    synchronize = synchronizer(torch.device(device))

    def run() -> None:
        call()
        synchronize()

    run()
    benchmark(run)


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", LAYERS, ids=_name)
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        (device, backend)
        for device in DEVICES
        for backend in (*available_backends(torch.device(device)), "sgd_fused")
    ],
)
def test_step(benchmark, device, backend, shape):
    """One layer's `step()`, on every backend and in fused torch SGD."""
    benchmark.group = f"step {_name(shape)} {device}"
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.Size(shape)], torch.float32, torch.device(device), generator
    weights, grads = make_weights(*tensors), make_grads(*tensors)
    if backend == "sgd_fused":
        provider = TorchSGD(backend, weights, grads, SETTINGS, fused=True)
    else:
        provider = FusedCZM(backend, weights, grads, SETTINGS)
    _time(benchmark, device, provider.step)


def _relu_mul(x: Tensor, residual: Tensor) -> Tensor:
    noise = torch.empty(x.shape[:2], device=x.device).uniform_(1 - AMPLITUDE, 1 + AMPLITUDE)
    return torch.relu(x + residual) * noise[:, :, None, None]


def _add_relu_noise(x: Tensor, residual: Tensor) -> Tensor:
    return add_relu_noise(x, residual, AMPLITUDE)


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=_name)
@pytest.mark.parametrize("function", [_add_relu_noise, _relu_mul], ids=["fused", "eager"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_add_relu_noise(benchmark, device, direction, function, shape):
    """The tail of a residual unit, against relu and mul."""
    benchmark.group = f"add_relu_noise {direction} {_name(shape)} {device}"
    x, residual = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    if direction == "forward":
        call = partial(function, x, residual)
    else:
        call = _backward(function(x, residual), [x, residual])
    _time(benchmark, device, call)


def _exp_mul(direction: Tensor, log_scale: Tensor) -> Tensor:
    return log_scale.exp().view(-1, 1, 1, 1) * direction


@pytest.mark.parametrize("shape", LAYERS, ids=_name)
@pytest.mark.parametrize(
    "function", [exp_scale.exp_scale, _exp_mul], ids=["fused", "eager"]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", DEVICES)
def test_exp_scale(benchmark, device, direction, function, shape):
    """The materialisation W = exp(g) V, against exp and mul."""
    benchmark.group = f"exp_scale {direction} {_name(shape)} {device}"
    # ExpScale.apply is below what loads the native module.
    choose(torch.device(device))
    v = torch.randn(shape, device=device, requires_grad=True)
    g = torch.zeros(shape[0], device=device, requires_grad=True)
    if direction == "forward":
        call = partial(function, v, g)
    else:
        call = _backward(function(v, g), [v, g])
    _time(benchmark, device, call)


def _backward(output: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    grad = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
