"""CZMConv*, exp_scale and CZMBasicBlock."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from czm_fused.nn import (
    ChannelAffine,
    ChannelNoise,
    Copy,
    CZMBasicBlock,
    CZMConv1d,
    CZMConv2d,
    CZMConv3d,
    ReLU6,
    exp_scale,
)
from czm_fused.ops import backends
from czm_fused.ops import exp_scale as ops

BACKENDS = [name for name in ("cpu", "reference") if backends.problem(name, "cpu") is None]
PAIRS = ((CZMConv1d, nn.Conv1d), (CZMConv2d, nn.Conv2d), (CZMConv3d, nn.Conv3d))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    (5,),
    (4, 3),
    (4, 3, 5),
    (4, 3, 3, 3),
    (2, 3, 2, 3, 2),
    (0, 3, 3),
    (3, 0, 3),
    (2, 700, 3, 3),
)

op = torch.ops.czm_fused.exp_scale.default
op_backward = torch.ops.czm_fused.exp_scale_backward.default


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
    if layout == "channels_last" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_czm_conv_is_a_drop_in(ours, theirs):
    assert issubclass(ours, theirs)
    convolution = ours(4, 6, 3, 2, padding=1, groups=2, padding_mode="reflect", dtype=torch.float64)
    plain = theirs(4, 6, 3, 2, padding=1, groups=2, padding_mode="reflect", dtype=torch.float64)
    assert list(convolution.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    plain.load_state_dict(convolution.state_dict())
    x = torch.randn(2, 4, *[6] * (convolution.weight.dim() - 2), dtype=torch.float64)
    assert torch.equal(convolution(x), plain(x))
    assert ours(4, 6, 3, bias=False).bias is None
    assert repr(convolution) == "CZM" + repr(plain)
    for clone in (copy.deepcopy(convolution), pickle.loads(pickle.dumps(convolution))):
        assert torch.equal(clone.weight, convolution.weight)
        assert clone.stem is False


def test_czm_conv_starts_as_the_paper_says():
    convolution = CZMConv2d(8, 16, 3)
    assert not convolution.bias.any()
    torch.testing.assert_close(convolution.scale, torch.full((16,), 0.8))
    assert convolution.weight.mean((2, 3)).abs().max() < 1e-6
    stem = CZMConv2d(8, 16, 3, stem=True)
    assert (stem.weight.mean((2, 3)).abs() > 1e-3).any()
    assert "stem=True" in repr(stem)
    before = convolution.weight.clone()
    convolution.reset_parameters()
    assert not torch.equal(before, convolution.weight)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_czm_conv_can_be_scripted(ours, theirs):
    convolution = ours(3, 4, 3)
    x = torch.randn(2, 3, *[5] * (convolution.weight.dim() - 2))
    assert torch.equal(torch.jit.script(convolution)(x), convolution(x))


@pytest.mark.parametrize("classes", PAIRS)
def test_stem_is_keyword_only_and_torch_s_arguments_keep_their_places(classes):
    (*ours, stem), theirs = (inspect.signature(each).parameters.values() for each in classes)
    assert (stem.name, stem.kind) == ("stem", inspect.Parameter.KEYWORD_ONLY)
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    assert nn.utils.skip_init(classes[0], 3, 8, 3, stem=True).stem
    with pytest.raises(TypeError):
        CZMConv2d(8, 16, 3, 1, 0, 1, 1, True, "zeros", None, None, True)
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        CZMConv2d(3, 4, 3, groups=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_direction_times_scale_is_the_weight(dtype):
    convolution = CZMConv2d(3, 4, 3, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        convolution.weight[1] *= 3
    weight, direction, scale = convolution.weight, convolution.direction, convolution.scale
    assert direction.shape == weight.shape
    assert scale.shape == (4,)
    assert direction.dtype == scale.dtype == dtype
    assert not direction.requires_grad
    assert not scale.requires_grad
    # A norm of 27 squares (14 eps at most), a quotient and a product in the arithmetic's precision;
    # the direction and the scale round to the dtype once each.
    eps = torch.finfo(dtype).eps + 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    product = direction.double() * scale.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(product, weight.detach().double(), rtol=eps, atol=1e-7)
    torch.testing.assert_close(
        direction.double().flatten(1).norm(dim=1), torch.ones(4).double(), rtol=14 * eps, atol=0
    )
    for name in ("direction", "scale"):
        with pytest.raises(AttributeError):
            setattr(convolution, name, direction)


def test_direction_of_a_zero_filter_is_zero():
    convolution = CZMConv2d(3, 4, 3)
    with torch.no_grad():
        convolution.weight[0] = 0
    assert not convolution.direction[0].any()
    assert convolution.scale[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_operator_and_plain_torch_agree_with_float64(poisoned, dtype, shape, layout):
    torch.manual_seed(0)
    direction = lay_out(torch.randn(shape), layout).to(dtype)
    grad = torch.randn(shape).to(dtype)
    log_scale = torch.randn(shape[:1]).to(dtype)
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    scale = log_scale.double().exp().view(-1, *[1] * (len(shape) - 1))
    # exp is right to one eps, the product to a half, and a half type rounds once more.
    relative = 2 * arithmetic + torch.finfo(dtype).eps
    # The sum of n products, each right to an eps, in any order: n eps of the sum of magnitudes.
    terms = (grad.double() * direction.double() * scale).unsqueeze(-1).flatten(1)
    slack = (terms.shape[1] + 4) * arithmetic * terms.abs().sum(1) + torch.finfo(dtype).tiny
    variants = (
        (op, op_backward),
        (ops.exp_scale.run_reference, ops.exp_scale_backward.run_reference),
        (ops.reference.exp_scale, ops.reference.exp_scale_backward),
    )
    for forward, backward in variants:
        weight = forward(direction, log_scale)
        grad_direction, grad_log_scale = backward(grad, direction, log_scale)
        assert weight.dtype == grad_direction.dtype == grad_log_scale.dtype == dtype
        for actual, expected in ((weight, direction), (grad_direction, grad)):
            torch.testing.assert_close(
                actual.double(),
                expected.double() * scale,
                rtol=relative,
                atol=torch.finfo(dtype).smallest_normal,
            )
        error = (grad_log_scale.double() - terms.sum(1)).abs()
        assert (error <= slack + torch.finfo(dtype).eps * terms.sum(1).abs()).all()
    assert (
        op(direction, log_scale).stride()
        == ops.exp_scale.run_reference(direction, log_scale).stride()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operator_takes_a_float32_log_scale_with_half_weights(dtype):
    direction, grad = torch.randn(2, 3, 4, 5).to(dtype)
    log_scale = torch.randn(3)
    assert torch.equal(
        op(direction, log_scale),
        (direction.float() * log_scale.exp()[:, None, None]).to(dtype),
    )
    grad_direction, grad_log_scale = op_backward(grad, direction, log_scale)
    assert grad_direction.dtype == dtype
    assert grad_log_scale.dtype == torch.float32


def test_operator_gives_the_same_bits_on_any_number_of_threads():
    direction, grad = torch.randn(2, 300, 64, 3, 3)
    log_scale = torch.randn(300)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append((op(direction, log_scale), *op_backward(grad, direction, log_scale)))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(requires_grad, layout, dtype):
    direction = lay_out(torch.randn(4, 3, 2, 3, dtype=dtype), layout).requires_grad_(requires_grad)
    grad = torch.randn_like(direction).requires_grad_(requires_grad)
    log_scale = torch.randn(4, requires_grad=requires_grad)
    torch.library.opcheck(op, (direction, log_scale))
    torch.library.opcheck(op_backward, (grad, direction, log_scale))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_and_gradgradcheck(layout):
    torch.manual_seed(0)
    direction = lay_out(torch.randn(3, 2, 2, 2, dtype=torch.float64), layout).requires_grad_()
    grad = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op, (direction, log_scale))
    assert torch.autograd.gradgradcheck(op, (direction, log_scale))
    assert torch.autograd.gradcheck(op_backward, (grad, direction, log_scale))
    assert torch.autograd.gradgradcheck(op_backward, (grad, direction, log_scale))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.Conv1d(4, 4, 5, groups=2, dtype=torch.float64),
        lambda: CZMConv3d(2, 3, 2, bias=False),
        lambda: nn.Conv2d(3, 4, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        lambda: nn.Linear(3, 4),
    ],
)
def test_exp_scale_keeps_the_weight_and_can_be_undone(backend, make):
    module = make()
    names, kind = list(module.state_dict()), type(module)
    weight = module.weight.detach().clone()
    assert exp_scale(module) is module
    direction, log_scale = module.parametrizations.weight.parameters()
    assert log_scale.dtype == torch.promote_types(weight.dtype, torch.float32)
    torch.testing.assert_close(
        direction.detach().float().flatten(1).norm(dim=1),
        torch.ones(len(weight)),
        rtol=torch.finfo(weight.dtype).eps * 8 + 1e-6,
        atol=0,
    )
    # A quotient and a product in the dtype; a norm, a logarithm and an exponential, both below 3 in
    # magnitude, in float32 at least.
    arithmetic = torch.promote_types(weight.dtype, torch.float32)
    relative = 2 * torch.finfo(weight.dtype).eps + 16 * torch.finfo(arithmetic).eps
    torch.testing.assert_close(module.weight.detach(), weight, rtol=relative, atol=0)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is kind
    assert sorted(module.state_dict()) == sorted(names)
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.requires_grad
    torch.testing.assert_close(module.weight.detach(), weight, rtol=relative, atol=0)


def test_exp_scale_gradients_are_those_of_the_equation(backend):
    convolution = exp_scale(nn.Conv2d(3, 4, 3, dtype=torch.float64))
    direction, log_scale = convolution.parametrizations.weight.parameters()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    actual = torch.autograd.grad(convolution(x).square().sum(), (direction, log_scale))
    weight = log_scale.exp()[:, None, None, None] * direction
    output = F.conv2d(x, weight, convolution.bias)
    expected = torch.autograd.grad(output.square().sum(), (direction, log_scale))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU module is not built")
def test_exp_scale_is_one_operator_forward_and_one_backward():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names = []
    convolution = exp_scale(nn.Conv2d(3, 4, 3))
    parameters = list(convolution.parametrizations.weight.parameters())
    grad = torch.randn(4, 3, 3, 3)
    with Recorder():
        torch.autograd.grad(convolution.weight, parameters, grad)
    names = [name for name in names if name != "aten::detach"]
    assert names == ["czm_fused::exp_scale", "czm_fused::exp_scale_backward"]


def test_exp_scale_of_a_zero_filter_is_finite(backend):
    convolution = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(convolution.weight)
    exp_scale(convolution)
    assert not convolution.weight.any()
    assert not convolution.parametrizations.weight.original1.any()
    convolution(torch.randn(1, 3, 4, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for p in convolution.parameters())


def test_exp_scale_differentiates_forwards(backend):
    direction = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    arguments = (direction, log_scale)
    assert torch.autograd.gradcheck(ops.exp_scale, arguments, check_forward_ad=True)


def test_exp_scale_compiles_into_one_graph():
    torch._dynamo.reset()
    convolution = exp_scale(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 5, 5)
    parameters = list(convolution.parameters())
    expected = torch.autograd.grad(convolution(x).sum(), parameters)
    compiled = torch.compile(convolution, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), convolution(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), parameters), expected)


def test_exp_scale_refuses_what_has_no_filters_along_dimension_0():
    with pytest.raises(ValueError, match="ConvTranspose2d has its input channels there"):
        exp_scale(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(ValueError, match="parametrized already"):
        exp_scale(exp_scale(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="no weight yet"):
        exp_scale(nn.LazyConv2d(4, 3))
    with pytest.raises(ValueError, match="a hook computes it; .*prune.remove"):
        exp_scale(prune.identity(nn.Conv2d(3, 4, 3), "weight"))
    with pytest.raises(ValueError, match="scripted or traced by torch.jit"):
        exp_scale(torch.jit.script(nn.Conv2d(3, 4, 3)))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        exp_scale(torch.ones(4, 3, 3, 3))
    with pytest.raises(ValueError, match="conv must have a parameter `weight`.*ReLU"):
        exp_scale(nn.ReLU())


@pytest.mark.parametrize("channels", [(4, 4), (4, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_basic_block_is_the_residual_unit(backend, channels, stride):
    block = CZMBasicBlock(*channels, stride)
    x = torch.randn(2, channels[0], 6, 6)
    branch = block.conv2(torch.relu(block.conv1(x)))
    shortcut = torch.zeros_like(branch)
    shortcut[:, : channels[0]] = x[:, :, ::stride, ::stride]
    torch.testing.assert_close(block(x), torch.relu(branch + shortcut), rtol=0, atol=0)
    assert [name for name, _ in block.named_parameters()] == ["conv1.weight", "conv2.weight"]
    assert CZMBasicBlock(*channels, stride, bias=True).conv2.bias is not None


def test_basic_block_draws_noise_in_training_only(backend):
    block = CZMBasicBlock(4, 4, amplitude=0.5)
    x = torch.randn(2, 4, 6, 6)
    ratio = block(x) / block.eval()(x)
    assert torch.equal(block(x), block(x))
    assert ((ratio - 1).abs() > 1e-3).any()
    block.train().amplitude = 0.0
    assert torch.equal(block(x), block.eval()(x))
    assert "amplitude=0.0" in repr(block)
    with pytest.raises(ValueError, match="amplitude"):
        CZMBasicBlock(4, 4, amplitude=1.5)(x)
    with pytest.raises(ValueError, match="out_channels must be at least in_channels, 4, but was 3"):
        CZMBasicBlock(4, 3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("amplitude", [-0.5, 5.0])
@pytest.mark.parametrize("name", ["amplitude", "branch_amplitude"])
def test_basic_block_refuses_amplitudes(name, amplitude, training):
    block = CZMBasicBlock(4, 4).train(training)
    setattr(block, name, amplitude)
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), but was {amplitude}"):
        block(torch.ones(2, 4, 3, 3))
    with pytest.raises(torch.jit.Error, match=r"must be in \[0, 1\)"):
        torch.jit.script(block)(torch.ones(2, 4, 3, 3))


def test_basic_block_keeps_two_activations_and_the_noise(backend):
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    units = nn.Sequential(*(CZMBasicBlock(4, 4, amplitude=0.1) for _ in range(3)))
    x = torch.randn(8, 4, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = units(x)
    weights = {p.untyped_storage().data_ptr() for p in units.parameters()}
    numels = [t.numel() for key, t in saved.items() if key not in weights]
    # Of three units: the input and two activations each, and u for each.
    assert sorted(numels) == [8 * 4] * 3 + [x.numel()] * 7
    output.sum().backward()


def captured(module, how):
    return torch.jit.script(module) if how == "script" else torch.fx.symbolic_trace(module)


@pytest.mark.parametrize("how", ["script", "fx"])
@pytest.mark.parametrize("training", [False, True])
def test_basic_block_can_be_captured(how, training):
    block = CZMBasicBlock(4, 6, 2, amplitude=0.5, branch_amplitude=0.25).train(training)
    x = torch.rand(200, 4, 6, 6)
    actual, expected = captured(block, how)(x), block.eval()(x)
    if not training:
        assert torch.equal(actual, expected)
        return
    # Without the branch's noise, only the output's is left, one number a channel.
    block = CZMBasicBlock(4, 6, 2, amplitude=0.5)
    ratio = captured(block, how)(x) / block.eval()(x)
    ratios = ratio.flatten(2).nanmean(dim=2)
    assert 0.5 <= ratios.nan_to_num(1.0).min() < 0.55
    assert 1.45 < ratios.nan_to_num(1.0).max() <= 1.5 + 1e-6


@pytest.mark.parametrize("how", ["script", "fx"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_replacements_of_batch_norm_can_be_captured(how, shape):
    x = torch.randn(shape)
    weight, bias = torch.randn(3), torch.randn(3)
    space = [1] * (len(shape) - 2)
    affine = captured(ChannelAffine(weight, bias), how)
    torch.testing.assert_close(affine(x), x * weight.view(3, *space) + bias.view(3, *space))
    assert torch.equal(captured(Copy(), how)(x), x)
    noisy = captured(ChannelNoise(0.5), how)(x)
    assert noisy.shape == x.shape
    ratio = (noisy / x).flatten(2) if space else (noisy / x)[..., None]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert ((ratio >= 0.499) & (ratio <= 1.501)).all() and ratio.unique().numel() > 1
    assert torch.equal(captured(ChannelNoise(0.5).eval(), how)(x), x)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_channel_affine_keeps_the_layout(shape):
    affine = ChannelAffine(torch.randn(3), torch.randn(3))
    for x in (torch.randn(shape), lay_out(torch.randn(shape), "channels_last")):
        assert affine(x).stride() == x.stride()


def relu6_and_gradients(activation, x, grad):
    x = x.clone().requires_grad_()
    given = x.clone()
    output = activation(given)
    output.backward(grad)
    return output.detach(), given.detach(), x.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu6_is_torch_s(dtype, inplace):
    edges = torch.tensor([-1.0, -0.0, 0.0, 1e-3, 3.0, 6.0, 7.0, float("inf"), float("nan")])
    x, grad = edges.to(dtype).view(1, 9, 1), torch.arange(1, 10).to(dtype).view(1, 9, 1)
    actual = relu6_and_gradients(ReLU6(inplace), x, grad)
    expected = relu6_and_gradients(nn.ReLU6(inplace), x, grad)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_relu6_keeps_its_output_alone(inplace):
    kept = []
    x = torch.randn(2, 3, requires_grad=True).clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = ReLU6(inplace)(x)
    assert [t.data_ptr() for t in kept] == [output.data_ptr()]
    assert (output is x) == inplace


@pytest.mark.parametrize("inplace", [False, True])
def test_relu6_differentiates_twice_and_under_vmap(inplace):
    def activation(x):
        return ReLU6(inplace)(x.clone())

    x = torch.linspace(-1, 7, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(activation, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(activation, x)
    hessian = torch.func.hessian(lambda x: activation(x).pow(3).sum())(x[0])
    assert torch.equal(hessian, (6 * x[0] * ((x[0] > 0) & (x[0] < 6))).diag())
    gradient = torch.func.vmap(torch.func.grad(lambda row: activation(row).sum()))(x.detach())
    assert torch.equal(gradient, ((x > 0) & (x < 6)).double())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("trace", [torch.jit.script, torch.fx.symbolic_trace])
def test_relu6_can_be_traced(trace, inplace):
    network = nn.Sequential(ReLU6(inplace))
    x = torch.randn(4, 3).mul(5).requires_grad_()
    assert torch.equal(trace(network)(x.clone()), F.relu6(x))
