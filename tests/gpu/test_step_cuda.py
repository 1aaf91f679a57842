"""What only a GPU can show of the CUDA step; the matrix of cases is in tests/ops."""

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD
from czm_fused.ops import backends

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and backends.problem("cuda", "cuda") is not None,
        reason=str(backends.problem("cuda", "cuda")),
    ),
]


def network(device="cuda"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 600, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(600, 10),
    )
    return model.to(device)


def set_grads(model, seed=0, scale=1.0):
    # Large gradients of filters move their log-scales by so much that exp overflows in a few steps.
    scale *= 0.1
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator)
        param.grad = (scale * grad).to(param.device)


def assert_same_parameters(model, expected):
    # Three steps in float32, which differ in exp and in the order of sums.
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5)


def optimizer_of(model, backend="cuda", lr=0.1):
    options = {"momentum": 0.9, "nesterov": True, "backend": backend, "fused": True}
    return FusedCZMSGD(model.parameters(), lr=lr, **options)


# Held by a warp, by 64, 128 or 256 threads with one team idle, streamed in tiles, and by channel.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(9, 17, 3, 3), (3, 100, 3, 3), (3, 200, 3, 3), (3, 455, 3, 3), (2, 1000, 3, 3), (1, 2, 8000)],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_kind_of_filter(layout, shape, dtype):
    torch.manual_seed(0)
    size = torch.Size(shape[1:]).numel() ** -0.5
    weight = size * torch.randn(shape)
    if layout == "channels_last":
        if weight.dim() != 4:
            pytest.skip("torch has no such layout for this shape")
        weight = weight.to(memory_format=torch.channels_last)
    param = nn.Parameter(weight.to("cuda", dtype))
    expected = nn.Parameter(param.detach().double().cpu())
    optimizer = FusedCZMSGD([param], lr=0.1, momentum=0.9, backend="cuda")
    oracle = FusedCZMSGD([expected], lr=0.1, momentum=0.9, backend="reference")
    for _ in range(2):
        param.grad = size * torch.randn_like(param)
        expected.grad = param.grad.double().cpu()
        optimizer.step()
        oracle.step()
    # Two steps: some ten roundings each in the arithmetic's dtype, and one in the weights'.
    real = torch.promote_types(dtype, torch.float32)
    bound = (20 * torch.finfo(real).eps + 2 * torch.finfo(dtype).eps) * expected.abs().max().item()
    torch.testing.assert_close(param.double().cpu(), expected, rtol=0, atol=bound)


def test_step_is_one_launch():
    model = network()
    optimizer = optimizer_of(model)
    set_grads(model)
    optimizer.step()
    set_grads(model, seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if event.device_time_total > 0]
    assert len(kernels) == 1 and "step_kernel" in kernels[0], kernels


def test_step_never_waits_for_the_device():
    model = network()
    optimizer = optimizer_of(model)
    set_grads(model)
    optimizer.step()
    set_grads(model, seed=1)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def captured(optimizer):
    """Return a graph of a step, after one that makes the plan, as any warm-up does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def test_graph_replays_with_a_changing_rate():
    model, expected = network(), network("cpu")
    lr = torch.tensor(0.1, device="cuda")
    optimizer, oracle = optimizer_of(model, lr=lr), optimizer_of(expected, "reference")
    set_grads(model)
    graph = captured(optimizer)
    set_grads(expected)
    oracle.step()
    for rate in (0.05, 0.2):
        lr.fill_(rate)
        graph.replay()
        oracle.param_groups[0]["lr"] = rate
        oracle.step()
    torch.cuda.synchronize()
    assert_same_parameters(model, expected)


def test_graph_replays_under_a_scheduler():
    model, expected = network(), network("cpu")
    optimizer = FusedCZMSGD(model.parameters(), lr=0.125, momentum=0.9, capturable=True)
    oracle = FusedCZMSGD(expected.parameters(), lr=0.125, momentum=0.9, backend="reference")
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, oracle)]
    set_grads(model)
    graph = captured(optimizer)
    set_grads(expected)
    oracle.step()
    for _ in range(3):
        for schedule in schedules:
            schedule.step()
        graph.replay()
        oracle.step()
    torch.cuda.synchronize()
    assert_same_parameters(model, expected)


@pytest.mark.parametrize("broken", [False, True])
def test_grad_scaler(broken):
    model, expected = network(), network("cpu")
    optimizer, oracle = optimizer_of(model), optimizer_of(expected, "reference")
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    before = [param.detach().clone() for param in model.parameters()]
    scaler.scale(torch.zeros((), device="cuda"))
    set_grads(model, scale=256.0)
    if broken:
        next(model.parameters()).grad.view(-1)[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    if broken:
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param, old)
    else:
        set_grads(expected)
        oracle.step()
        assert_same_parameters(model, expected)


def test_a_state_on_another_device_follows_its_parameter():
    model = network()
    optimizer = optimizer_of(model)
    set_grads(model)
    optimizer.step()
    state = optimizer.state[next(model.parameters())]
    state["momentum_buffer"] = state["momentum_buffer"].cpu()
    optimizer.step()
    assert state["momentum_buffer"].is_cuda
