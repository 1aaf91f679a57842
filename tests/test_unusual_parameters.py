"""Parameters lazy or complex, of another dtype than their gradients, or of doubtful shape."""

import copy
import warnings

import pytest
import torch
from torch import nn

from czm_fused import FusedCZMSGD, GradientRelease, czm_param_groups
from small_training import CZM, PLAIN, assert_equal, network, on_every_backend, train, weights

OPTIONS = (
    {},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"momentum": 1.0},
    {"momentum": 1.5},
)


def pair(make, **options):
    """Return two equal modules, and this package's and torch's optimizer of them."""
    torch.manual_seed(0)
    ours = make()
    theirs = copy.deepcopy(ours)
    return (
        (ours, FusedCZMSGD(ours.parameters(), lr=0.05, **PLAIN, **options)),
        (theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, foreach=False, **options)),
    )


# --- Lazy ---------------------------------------------------------------------------------------


def lazy_network():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


@on_every_backend
@pytest.mark.parametrize("compiled", [False, True])
def test_lazy_parameters_are_initialised_before_the_first_step(compiled, backend):
    torch._dynamo.reset()
    model = lazy_network()
    optimizer = FusedCZMSGD(model.parameters(), **CZM, backend=backend)
    optimizer.step()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    model(x)
    twin = copy.deepcopy(model)
    other = FusedCZMSGD(twin.parameters(), **CZM, backend=backend)
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for _ in range(2):
        for each in (model, twin):
            each.zero_grad()
            each(x).square().mean().backward()
        step()
        other.step()
    assert_equal(weights(model), weights(twin))
    assert optimizer.state_dict()["state"].keys() == {0, 1, 2, 3}


def test_lazy_parameters_that_stay_uninitialised_do_not_stop_the_others():
    model, lazy = network(), nn.LazyLinear(3)
    optimizer = FusedCZMSGD([*model.parameters(), *lazy.parameters()], **CZM)
    optimizer.load_state_dict(optimizer.state_dict())
    twin = network()
    other = FusedCZMSGD(twin.parameters(), **CZM)
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert_equal(weights(model), weights(twin))


# --- Gradients of another dtype -------------------------------------------------------------------


def step_by_hand(optimizer, module, dtype, seed, size):
    generator = torch.Generator().manual_seed(seed)
    for param in module.parameters():
        param.grad = None
        param.grad_dtype = dtype
        param.grad = (size * torch.randn(param.shape, generator=generator)).to(dtype)
    optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "size"),
    [
        (torch.float32, torch.bfloat16, 1.0),
        (torch.float32, torch.float64, 1.0),
        (torch.float64, torch.float32, 1.0),
        (torch.bfloat16, torch.float32, 1.0),
        # Gradients that are zeros and infinities in float16.
        (torch.float16, torch.float32, 1e-9),
        (torch.float16, torch.float32, 1e6),
    ],
)
def test_gradients_of_another_dtype_are_those_of_sgd(dtype, grad_dtype, size):
    (ours, optimizer), (theirs, other) = pair(lambda: network().to(dtype))
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr"] = 0.01 / size
    before = weights(ours)
    for seed in range(3):
        step_by_hand(optimizer, ours, grad_dtype, seed, size)
        step_by_hand(other, theirs, grad_dtype, seed, size)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=2 * eps, atol=2 * eps)
    assert not any(map(torch.equal, weights(ours), before))


def test_gradients_of_another_dtype_may_come_and_go():
    """Momentum keeps its parameter's dtype, as in a training with gradients of that dtype."""
    (ours, optimizer), (theirs, other) = pair(network, momentum=0.9)
    grad_dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.bfloat16, torch.float32)
    for seed, dtype in enumerate(grad_dtypes):
        step_by_hand(optimizer, ours, dtype, seed, 1.0)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.to(q.dtype)
        other.step()
        torch.testing.assert_close(weights(ours), weights(theirs))


def test_a_backend_asked_for_by_name_takes_gradients_of_its_dtype_alone():
    pytest.importorskip("czm_fused._C_cpu")
    model = network()
    optimizer = FusedCZMSGD(model.parameters(), lr=0.1, backend="cpu")
    before = weights(model)
    with pytest.raises(RuntimeError, match="gradient of parameter 0 is torch.float64, but the"):
        step_by_hand(optimizer, model, torch.float64, 0, 1.0)
    assert_equal(weights(model), before)


def test_gradients_of_whole_numbers_are_refused():
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedCZMSGD([param], lr=0.1)
    param.grad_dtype = None
    param.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="gradient of parameter 0 is torch.int64"):
        optimizer.step()


# --- Complex --------------------------------------------------------------------------------------


class ComplexModule(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3, dtype=dtype))
        self.scale = nn.Parameter(torch.randn((), dtype=dtype))
        self.real = nn.Parameter(torch.randn(3, dtype=dtype.to_real()))

    def forward(self):
        return (self.scale.conj() * self.matrix @ (self.matrix + self.real)).abs().square().sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_those_of_sgd(dtype, options):
    pairs = pair(lambda: ComplexModule(dtype), **options)
    for group in (group for _, optimizer in pairs for group in optimizer.param_groups):
        group["lr"] = 1e-3
    for _ in range(4):
        for module, optimizer in pairs:
            optimizer.zero_grad()
            module().backward()
            optimizer.step()
        torch.testing.assert_close(*(weights(module) for module, _ in pairs))
    (ours, optimizer), (theirs, other) = pairs
    if "momentum" in options:
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert optimizer.state[p]["momentum_buffer"].dtype == p.dtype
            torch.testing.assert_close(
                optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
            )


def test_complex_state_is_loaded_and_gradients_may_be_conjugates():
    (ours, optimizer), (theirs, other) = pair(lambda: ComplexModule(torch.complex64), momentum=0.9)
    for _ in range(2):
        for module, each in ((ours, optimizer), (theirs, other)):
            for param in module.parameters():
                param.grad = torch.linspace(0, 1, param.numel()).view(param.shape).to(param.dtype)
                if param.is_complex():
                    param.grad = (param.grad * (1 + 2j)).conj()
            each.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_a_compiled_step_of_complex_parameters():
    torch._dynamo.reset()
    (ours, optimizer), (theirs, other) = pair(lambda: ComplexModule(torch.complex64), momentum=0.9)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        for module, step in ((ours, compiled), (theirs, other.step)):
            module.zero_grad()
            (1e-2 * module()).backward()
            step()
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_complex_parameters_that_become_filters_are_refused():
    param = nn.Parameter(torch.ones(3, 2, 2, dtype=torch.complex64))
    optimizer = FusedCZMSGD([{"params": [param], "exp_scale": False, "zmg": 0.0, "luma": 0.0}])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["zmg"] = 0.5
    with pytest.raises(TypeError, match="parameter 0 is torch.complex64, but filters must be real"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_orthogonal_parametrization(dtype):
    """As torch's own tests of its parametrizations train."""

    def make():
        layer = nn.Linear(4, 3, dtype=dtype)
        return nn.utils.parametrizations.orthogonal(layer)

    pairs = pair(make)
    x = torch.randn(5, 4, dtype=dtype)
    for _ in range(3):
        for layer, optimizer in pairs:
            optimizer.zero_grad()
            layer(x).abs().square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(*(weights(layer) for layer, _ in pairs))


@on_every_backend
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_momentum_is_that_of_sgd(options, backend):
    (ours, optimizer), (theirs, other) = pair(network, **options)
    optimizer.backend = backend
    train(ours, optimizer, 4)
    train(theirs, other, 4)
    torch.testing.assert_close(weights(ours), weights(theirs))


# --- Shapes that tell, or do not ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 197, 32), (1, 1, 768), (64, 1, 1), (8, 1, 1, 1)])
def test_shapes_that_tell_are_no_filters(shape):
    (ours, theirs) = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = FusedCZMSGD([ours], **CZM)
    other = torch.optim.SGD([theirs], **CZM)
    for _ in range(2):
        ours.grad, theirs.grad = torch.full(shape, 0.3), torch.full(shape, 0.3)
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs)
    assert optimizer.state[ours].keys() == {"momentum_buffer"}


@pytest.mark.parametrize(
    "shape",
    [
        nn.Bilinear(5, 6, 7).weight.shape,
        (4, 16, 8, 3, 3),  # Stacked convolutions of two dimensions, and of one.
        (4, 16, 8, 3),
        (4, 16, 8),  # Stacked linear layers.
        (1, 8, 14, 14),  # Positions in an image.
        (1, 5, 8),
        (2, 3, 3, 3, 3, 3),
    ],
)
def test_shapes_that_may_be_filters_are_warned_about(shape):
    with pytest.warns(UserWarning, match="are taken for filters") as record:
        FusedCZMSGD([nn.Parameter(torch.ones(shape))], **CZM)
    assert str(tuple(shape)) in str(record[0].message)
    assert record[0].filename == __file__


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 1, 1),
        nn.Conv2d(8, 8, (1, 7)),
        nn.Conv2d(8, 8, 31, groups=8),
        nn.Conv3d(4, 4, (3, 1, 1)),
        nn.Conv3d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 2),
    ],
    ids=str,
)
def test_convolutions_are_not_warned_about(convolution):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = FusedCZMSGD(convolution.parameters(), **CZM)
        convolution.weight.grad = torch.ones_like(convolution.weight)
        optimizer.step()
    assert "log_scale" in optimizer.state[convolution.weight]


def test_nothing_is_warned_about_where_the_modules_are_known():
    model = nn.Sequential(nn.Conv1d(3, 1, 32), nn.Bilinear(3, 4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = czm_param_groups(model)
        optimizer = FusedCZMSGD(groups, **CZM)
        FusedCZMSGD(model.parameters(), lr=0.1, **PLAIN)
        GradientRelease(optimizer)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    # A filter alone in its layer, which its shape would not tell.
    assert "log_scale" in optimizer.state[model[0].weight]
