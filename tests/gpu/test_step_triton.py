"""The Triton step on a GPU: launches, waits and graphs. Its numbers: tests/ops/test_step.py."""

import pytest
import torch

from czm_fused import FusedCZMSGD

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def model_and_optimizer(lr=0.1, dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 8, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 10),
    ).to("cuda", dtype)
    return model, FusedCZMSGD(model.parameters(), lr=lr, momentum=0.9, backend="triton", fused=True)


def set_grads(model, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for param in model.parameters():
        # A new tensor: its address changes, as after zero_grad(set_to_none=True).
        # Small, as large ones of filters move log-scales by so much that exp overflows.
        grad = 0.1 * torch.randn(param.shape, device="cuda", generator=generator)
        param.grad = grad.to(param.dtype)


def params_of(model):
    return [param.detach().clone() for param in model.parameters()]


def device_activities(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_step_is_one_launch(moved):
    model, optimizer = model_and_optimizer()
    set_grads(model, 0)
    for _ in range(3):
        optimizer.step()
    kept = [param.grad for param in model.parameters()]
    if moved:
        set_grads(model, 1)
    names = device_activities(optimizer.step)
    copies = [name for name in names if "Memcpy" in name]
    assert [name for name in names if name not in copies] == ["step_kernel"]
    assert len(copies) == moved
    del kept


def test_a_step_waits_for_nothing():
    model, optimizer = model_and_optimizer()
    set_grads(model, 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(3):
            set_grads(model, seed)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_many_steps_with_moving_gradients_are_the_reference_s():
    model, optimizer = model_and_optimizer(dtype=torch.float64)
    expected_model, expected_optimizer = model_and_optimizer(dtype=torch.float64)
    expected_optimizer.backend = "reference"
    for seed in range(50):
        for each, its_optimizer in ((model, optimizer), (expected_model, expected_optimizer)):
            set_grads(each, seed)
            its_optimizer.step()
    # Float64: rounding of 1e-16 a step against weights of size 1, fifty steps long.
    torch.testing.assert_close(params_of(model), params_of(expected_model), rtol=1e-11, atol=1e-11)


def test_graph_replays_with_a_changing_lr_between_eager_steps():
    def run(step_with, lr):
        model, optimizer = model_and_optimizer(lr)
        set_grads(model, 0)
        optimizer.step()
        captured = [param.grad for param in model.parameters()]
        step = step_with(model, optimizer)
        for value in (0.1, 0.05):
            lr.fill_(value)
            for param, grad in zip(model.parameters(), captured, strict=True):
                param.grad = grad
            step()
            # Other gradients, in eager mode, in between: the graph keeps its own addresses.
            set_grads(model, 1)
            optimizer.step()
        return params_of(model)

    def graph(model, optimizer):
        before = params_of(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        torch.testing.assert_close(params_of(model), before, rtol=0, atol=0)
        return graph.replay

    eager = run(lambda model, optimizer: optimizer.step, torch.tensor(0.1, device="cuda"))
    replayed = run(graph, torch.tensor(0.1, device="cuda"))
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)


def test_scaler_skips_and_unscales_on_the_device():
    model, optimizer = model_and_optimizer()
    expected_model, expected_optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for seed in range(4):
        set_grads(model, seed)
        set_grads(expected_model, seed)
        for param in model.parameters():
            param.grad *= 8.0
        if seed == 1:
            next(model.parameters()).grad[0] = float("inf")
        else:
            expected_optimizer.step()
        scaler.step(optimizer)
        scaler.update(new_scale=8.0)
    torch.testing.assert_close(params_of(model), params_of(expected_model), rtol=0, atol=0)
