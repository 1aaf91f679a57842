"""add_relu_noise: what it computes, what it saves, and what it composes with."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from czm_fused import functional
from czm_fused.functional import add_relu_noise
from czm_fused.ops import add_relu_noise as ops
from czm_fused.ops import backends

BACKENDS = [name for name in ("cpu", "reference") if backends.problem(name, "cpu") is None]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((3, 5), (2, 3, 7), (2, 16, 5, 5), (3, 1, 4, 1), (1, 5, 1, 1), (2, 3, 2, 3, 4), (0, 3, 2))
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")

op = torch.ops.czm_fused.add_relu_noise.default
op_backward = torch.ops.czm_fused.add_relu_noise_backward.default


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.fixture
def poisoned():
    """torch.empty filled with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if tensor.dim() < 3 and layout == "channels_last":
        layout = "contiguous"
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.contiguous()


def special_values(shape, dtype) -> torch.Tensor:
    values = torch.randn(shape, dtype=torch.float64)
    flat = values.view(-1)
    specials = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-40)
    for i, special in enumerate(specials[: max(0, flat.numel() - 1)]):
        flat[i] = special
    return values.to(dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    # NaNs are one value here: their payloads carry nothing.
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.nan_to_num(123.0), expected.nan_to_num(123.0)
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


class Recorder(TorchDispatchMode):
    """Names of the operators that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def saved_by(function) -> list[torch.Tensor]:
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("amplitude", [0.0, 0.4])
def test_add_relu_noise_is_the_paper_s_equation(
    backend, poisoned, dtype, shape, with_residual, amplitude
):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    residual = torch.randn(shape).to(dtype).requires_grad_() if with_residual else None
    grad = torch.randn(shape).to(dtype)
    state = torch.get_rng_state()
    output = add_relu_noise(x, residual, amplitude)
    inputs = [x, residual] if with_residual else [x]
    grads = torch.autograd.grad(output, inputs, grad)

    torch.set_rng_state(state)
    u = torch.ones(shape[:2], dtype=torch.float64)
    if amplitude:
        u = functional.draw_noise(x, amplitude).double()
    u = u.view(*shape[:2], *[1] * (len(shape) - 2))
    total = x.detach().double() + (residual.detach().double() if with_residual else 0)
    # The sum and the product round in the arithmetic's precision, half an eps each; the result
    # rounds once more for half types. Below the normal range an eps is absolute.
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32))
    relative = 1.01 * (arithmetic.eps + torch.finfo(dtype).eps / 2)
    tolerance = {"rtol": relative, "atol": torch.finfo(dtype).smallest_normal * relative}
    torch.testing.assert_close(output.double(), total.clamp(min=0) * u, **tolerance)
    for each in grads:
        expected = grad.double() * u * (total > 0)
        torch.testing.assert_close(each.double(), expected, **tolerance)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU module is not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", LAYOUTS)
def test_native_kernels_agree_with_plain_torch_to_the_bit(
    poisoned, dtype, shape, layout, other_layout
):
    torch.manual_seed(1)
    x = lay_out(special_values(shape, dtype), layout)
    other = lay_out(special_values(shape, dtype).flip(0), other_layout)
    drawn = functional.draw_noise(x, 0.9)
    for noise in (None, drawn):
        for residual in (None, other):
            output = op(x, residual, noise)
            expected = ops.add_relu_noise.run_reference(x, residual, noise)
            assert_same_bits(output, expected)
            assert_same_bits(output, ops.reference.add_relu_noise(x, residual, noise))
            assert output.stride() == expected.stride()
            grad = op_backward(other, output, noise)
            expected = ops.add_relu_noise_backward.run_reference(other, output, noise)
            assert_same_bits(grad, expected)
            assert grad.stride() == expected.stride()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_operator_agrees_with_plain_torch_on_any_shape(shape, layout, dtype, seed):
    torch.manual_seed(seed)
    x = lay_out(torch.randn(shape).to(dtype), layout)
    residual = torch.randn(shape).to(dtype)
    noise = functional.draw_noise(x, 0.5)
    output = op(x, residual, noise)
    assert_same_bits(output, ops.reference.add_relu_noise(x, residual, noise))
    assert_same_bits(
        op_backward(residual, output, noise),
        ops.reference.add_relu_noise_backward(residual, output, noise),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operator_gives_the_same_bits_on_any_number_of_threads(layout):
    # An odd size, so that threads begin in the middle of a pixel.
    x, residual = (lay_out(each, layout) for each in torch.randn(2, 3, 7, 97, 129))
    noise = functional.draw_noise(x, 0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            output = op(x, residual, noise)
            results.append((output, op_backward(residual, output, noise)))
    finally:
        torch.set_num_threads(threads)
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_nan_passes_as_in_relu(backend):
    x = torch.tensor([[float("nan"), -1.0, -0.0, 2.0]], requires_grad=True)
    output = add_relu_noise(x)
    assert_same_bits(output.detach(), torch.relu(x.detach()))
    (grad,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("amplitude", [0.0, 0.1])
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_saves_the_output_and_the_noise_only(backend, amplitude, with_residual):
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True) if with_residual else None
    outputs = []
    saved = saved_by(lambda: outputs.append(add_relu_noise(x, residual, amplitude)))
    expected = {outputs[0].untyped_storage().data_ptr()}
    assert expected <= storages(saved)
    assert sorted(tensor.numel() for tensor in saved) == ([12] if amplitude else []) + [300]


def test_half_types_save_the_output_in_half_precision(backend):
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    saved = saved_by(lambda: add_relu_noise(x, x.detach(), 0.1))
    assert sum(tensor.nbytes for tensor in saved) == 300 * 2 + 12 * 4


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU module is not built")
def test_operator_count_is_one_forward_and_one_backward():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True)
    grad = torch.randn_like(x)
    with Recorder() as recorder:
        torch.autograd.grad(add_relu_noise(x, residual, 0.1), (x, residual), grad)
    # Detaching is how autograd keeps and hands out the output; it runs no kernel.
    assert [name for name in recorder.names if name != "aten::detach"] == [
        "aten::empty.memory_format",
        "aten::uniform_",
        "czm_fused::add_relu_noise",
        "czm_fused::add_relu_noise_backward",
    ]


def test_environment_variable_selects_the_reference(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with Recorder() as recorder:
        add_relu_noise(x, x, 0.1).sum().backward()
    assert not [name for name in recorder.names if name.startswith("czm_fused")]


def test_residual_and_x_get_gradients_of_their_own(backend):
    x = torch.randn(2, 3, 4, requires_grad=True)
    residual = torch.randn(2, 3, 4, requires_grad=True)
    before = x.detach().clone(), residual.detach().clone()
    add_relu_noise(x, residual, 0.1).sum().backward()
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_one_tensor_as_both_x_and_residual(backend):
    x = torch.randn(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(add_relu_noise(x, x).sum(), x)
    assert torch.equal(grad, 2.0 * (x > 0))


def test_noise_is_one_factor_for_each_sample_and_channel(backend):
    torch.manual_seed(0)
    ratio = add_relu_noise(torch.ones(64, 32, 3, 3), amplitude=0.25)
    u = ratio[:, :, 0, 0]
    assert torch.equal(ratio, u[:, :, None, None].expand_as(ratio))
    assert u.min() >= 0.75
    assert u.max() <= 1.25
    assert u.unique().numel() > 2000
    # Five standard errors of the mean of 2048 uniform numbers: 5 * 0.5 / sqrt(12 * 2048).
    assert abs(u.mean() - 1) < 0.016


def test_eval_draws_no_noise(backend):
    x = torch.randn(2, 3, 4)
    assert torch.equal(add_relu_noise(x, amplitude=0.25, training=False), torch.relu(x))


def test_manual_seed_reproduces_the_noise_and_calls_differ(backend):
    x = torch.ones(3, 4, 2)
    torch.manual_seed(5)
    first, second = add_relu_noise(x, amplitude=0.5), add_relu_noise(x, amplitude=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, add_relu_noise(x, amplitude=0.5))
    assert not torch.equal(first, second)


def test_no_noise_draws_no_random_numbers(backend):
    state = torch.get_rng_state()
    add_relu_noise(torch.randn(0, 3, 2), amplitude=0.0)
    add_relu_noise(torch.ones(2, 3, 2), amplitude=0.5, training=False)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(backend, use_reentrant):
    weight = torch.randn(3, 3, 3, 3, requires_grad=True)

    def unit(x):
        x = add_relu_noise(F.conv2d(x, weight, padding=1), x, 0.3)
        return add_relu_noise(F.conv2d(x, weight, padding=1), x, 0.3)

    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.autograd.grad(unit(x).sum(), (x, weight))
    torch.manual_seed(3)
    output = checkpoint(unit, x, use_reentrant=use_reentrant)
    if use_reentrant:
        x.grad = weight.grad = None
        output.sum().backward()
        actual = (x.grad, weight.grad)
    else:
        actual = torch.autograd.grad(output.sum(), (x, weight))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_and_gradgradcheck(with_noise, layout):
    torch.manual_seed(0)
    # Away from the kink, where differences would straddle it.
    x = lay_out(torch.randn(2, 3, 2, 2, dtype=torch.float64), layout)
    residual = torch.randn_like(x)
    x = torch.where((x + residual).abs() < 0.1, x + 0.3, x).requires_grad_()
    residual.requires_grad_()
    noise = functional.draw_noise(x, 0.5) if with_noise else None

    def function(x, residual):
        return op(x, residual, noise)

    assert torch.autograd.gradcheck(function, (x, residual))
    assert torch.autograd.gradgradcheck(function, (x, residual))


@pytest.mark.parametrize("with_noise", [False, True])
def test_forward_mode(backend, with_noise):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    x = torch.where((x + residual).abs() < 0.1, x + 0.3, x).requires_grad_()
    residual.requires_grad_()
    noise = functional.draw_noise(x, 0.5) if with_noise else None
    output = ops.add_relu_noise(x, residual, noise)

    def gradient(grad):
        return torch.autograd.grad(output, x, grad, retain_graph=True)[0]

    def function(x, residual):
        return ops.add_relu_noise(x, residual, noise)

    assert torch.autograd.gradcheck(function, (x, residual), check_forward_ad=True)
    # The gradient is linear, so that its derivative is itself.
    tangent = torch.randn_like(output)
    with forward_ad.dual_level():
        dual = gradient(forward_ad.make_dual(torch.ones_like(output), tangent))
        derivative = forward_ad.unpack_dual(dual).tangent
    assert torch.equal(derivative, gradient(tangent))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(requires_grad, dtype, layout):
    x = lay_out(torch.randn(2, 3, 4, 5, dtype=dtype), layout).requires_grad_(requires_grad)
    residual = torch.randn(2, 3, 4, 5, dtype=dtype).requires_grad_(requires_grad)
    noise = functional.draw_noise(x, 0.5)
    # aot's trace of a view of another tensor is torch's affair.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    if layout in ("contiguous", "channels_last"):
        utilities += ("test_aot_dispatch_dynamic",)
    for arguments in ((x, residual, noise), (x, None, None)):
        torch.library.opcheck(op, arguments, test_utils=utilities)
        torch.library.opcheck(op_backward, (residual, x, arguments[2]), test_utils=utilities)


def test_autocast_promotes_mixed_dtypes(backend):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(3, 3, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        branch = F.conv2d(x, weight)
        output = add_relu_noise(branch, x, 0.1)
    assert branch.dtype == torch.bfloat16
    assert output.dtype == torch.float32
    output.sum().backward()
    assert x.grad.dtype == torch.float32
    half = torch.ones(1, 1, dtype=torch.float16)
    assert add_relu_noise(half, half.bfloat16()).dtype == torch.float32


def unit(x, weight):
    x = add_relu_noise(F.conv2d(x, weight, padding=1), x, 0.2)
    return F.conv2d(x, weight, padding=1)


def test_compile_traces_one_graph_of_plain_torch_that_saves_no_more():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager_decomp_partition

        return aot_eager_decomp_partition(graph, inputs)

    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, requires_grad=True)
    compiled = torch.compile(unit, backend=backend, fullgraph=True)
    saved = saved_by(lambda: compiled(x, weight))
    assert not [node for node in graphs[0].graph.nodes if "czm_fused" in str(node.target)]
    # The input and the weight, the activation between the convolutions, and u.
    assert sorted(tensor.numel() for tensor in saved) == [6, 81, 216, 216]

    torch.manual_seed(7)
    expected = unit(x, weight)
    expected_grads = torch.autograd.grad(expected.sum(), (x, weight))
    torch.manual_seed(7)
    actual = compiled(x, weight)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), (x, weight)), expected_grads)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor finds no C++ compiler")
def test_inductor_agrees_with_eager():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True)

    def function(x, residual):
        return add_relu_noise(x, residual, 0.3)

    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(function, fullgraph=True)
        torch.manual_seed(2)
        actual = compiled(x, residual)
        actual_grads = torch.autograd.grad(actual.sum(), (x, residual))
    torch.manual_seed(2)
    expected = function(x, residual)
    expected_grads = torch.autograd.grad(expected.sum(), (x, residual))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_export_holds_no_operator_of_ours():
    class Model(torch.nn.Module):
        def forward(self, x):
            return add_relu_noise(x, x, 0.1, self.training)

    program = torch.export.export(Model().eval(), (torch.randn(2, 3, 4, 4),))
    assert "czm_fused" not in str(program.graph)


def test_torch_func_transforms():
    x = torch.randn(4, 2, 3, 5)

    def loss(x):
        return add_relu_noise(x, x).sum()

    assert torch.equal(torch.func.grad(loss)(x), 2.0 * (x > 0))
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), 2.0 * (x > 0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amplitude": 1.0}, ValueError, r"amplitude must be in \[0, 1\), but was 1.0"),
        ({"amplitude": -0.1}, ValueError, "amplitude"),
        ({"amplitude": float("nan")}, ValueError, "amplitude"),
        ({"x": torch.ones(3)}, ValueError, r"x must have the dimensions \(N, C, ...\)"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be floating-point"),
        ({"x": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "x must be floating-point"),
        ({"residual": torch.ones(2, 1)}, ValueError, r"shape of x, \(2, 3\), but had \(2, 1\)"),
        ({"residual": torch.ones(2, 3).int()}, TypeError, "residual must be floating-point"),
        ({"residual": torch.ones(2, 3, device="meta")}, ValueError, "residual must be on the dev"),
    ],
)
def test_bad_input_is_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        add_relu_noise(**{"x": torch.ones(2, 3), **arguments})


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU module is not built")
def test_native_kernels_refuse_what_they_cannot_read():
    x = torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError, match="x and residual must have the same shape"):
        op(x, torch.ones(2, 3, 1), None)
    with pytest.raises(RuntimeError, match="noise must have the shape"):
        op(x, None, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="noise must be float32"):
        op(x, None, torch.ones(2, 3).double())
