"""Convolutions with unit filters V and scales exp(g), and the residual unit made of them."""

# torch is typed in part.
# mypy: allow-untyped-calls, no-warn-return-any

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from czm_fused import functional
from czm_fused.init import CONVOLUTIONS, HOOK_REMEDY, check_module, czm_weight_, is_depthwise
from czm_fused.ops import exp_scale as ops
from czm_fused.ops.registry import needs_plain_torch
from czm_fused.ops.step.reference import filter_norms

_Module = TypeVar("_Module", bound=nn.Module)


def residual_tail(x: Tensor, residual: Tensor | None, amplitude: float, training: bool) -> Tensor:
    """Compute `czm_fused.functional.add_relu_noise`, which torch.jit.script cannot compile."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return functional.add_relu_noise(x, residual, amplitude, training)
    functional.check_amplitude("amplitude", amplitude)
    total = x if residual is None else x + residual
    if training and amplitude > 0:
        shape = list(total.shape[:2]) + [1] * (total.dim() - 2)
        noise = torch.rand(shape, dtype=total.dtype, device=total.device)
        total = total * (1 - amplitude + 2 * amplitude * noise)
    return torch.relu(total)


class _MultiplyByNoise(torch.autograd.Function):
    """x * (1 + step * levels), which saves the levels alone, a byte each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, step: float) -> Tensor:
        ctx.save_for_backward(levels)
        ctx.step = step
        return torch.addcmul(x, x, levels, value=step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (levels,) = ctx.saved_tensors
        return torch.addcmul(grad, grad, levels, value=ctx.step), None, None


def _multiply_by_noise(x: Tensor, amplitude: float) -> Tensor:
    shape = list(x.shape[:2]) + [1] * (x.dim() - 2)
    levels = torch.randint(-127, 128, shape, dtype=torch.int8, device=x.device)
    step = amplitude / 127.5
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        # A compiler chooses for itself what to save.
        if not needs_plain_torch():
            result: Tensor = _MultiplyByNoise.apply(x, levels, step)
            return result
    return torch.addcmul(x, x, levels, value=step)


# torch.fx records a call instead of tracing what it does with shapes.
torch.fx.wrap("residual_tail")
torch.fx.wrap("mean_response")
torch.fx.wrap("_multiply_by_noise")


def _directions(weight: Tensor, norms: Tensor) -> Tensor:
    divisors = torch.where(norms > 0, norms, 1).view(-1, *[1] * (weight.dim() - 1))
    return (weight / divisors).to(weight.dtype)


def mean_response(
    weight: Tensor,
    input_mean: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: list[int],
    groups: int,
) -> Tensor:
    """Return what the filters of a convolution make of an input that is everywhere its mean.

    sum_c mean[c] sum_t W[f, c, t], of shape (filters,), without padding. torch.jit.trace warns of a
    decision by the weight's shape, so the convolution's own numbers decide.

    Args:
        weight: of shape (filters, channels / groups, taps...).
        input_mean: of shape (channels,).
        in_channels, out_channels, kernel_size, groups: of the convolution.
    """
    if max(kernel_size) == 1:
        filters = weight.flatten(1)
    else:
        # Over dimensions of taps, as a view of fewer dimensions would cost the gradient a copy.
        filters = weight.sum(dim=list(range(2, weight.dim())))
    if groups == in_channels and groups == out_channels:
        return (filters.squeeze(1) * input_mean).to(weight.dtype)
    if groups > 1:
        means = input_mean.view(groups, 1, -1).expand(-1, filters.shape[0] // groups, -1)
        input_mean = means.reshape(filters.shape)
    return (filters * input_mean).sum(dim=1).to(weight.dtype)


class _CZMConv(_ConvNd):
    """The additions of `CZMConv1d`, `CZMConv2d` and `CZMConv3d` to torch's convolutions."""

    if TYPE_CHECKING:
        # torch.jit.script cannot read these; its functions take tuples of any length as lists.
        input_mean: Tensor | None
        kernel_size: Any

    # torch.jit.script compiles every property that is not listed here.
    __jit_unused_properties__ = ["direction", "scale"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        stem: bool = False,
    ) -> None:
        # reset_parameters reads `stem`, and torch's constructor calls it.
        self.stem = stem
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        # The next class is nn.Conv1d, nn.Conv2d or nn.Conv3d, which mypy cannot know.
        super().__init__(*shape, bias, padding_mode, device, dtype)  # type: ignore[arg-type]
        self.register_buffer("input_mean", None)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, relative to the mean of the input if `center_` has set it."""
        weight, bias = self.weight, self.bias
        if self.input_mean is not None and bias is not None:
            bias = bias - mean_response(
                weight,
                self.input_mean,
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                self.groups,
            )
        return self._conv_forward(input, weight, bias)

    def reset_parameters(self) -> None:
        """Initialise the weight by CZMI (`czm_fused.init.czm_weight_`), the bias to 0, no mean."""
        czm_weight_(self.weight, zero_mean=not (self.stem or is_depthwise(self)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        # torch's constructor calls this first.
        if "input_mean" in self._buffers:
            self.input_mean = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the means of a state that has them, and forget them for one that has none."""
        if self.input_mean is None and f"{prefix}input_mean" in state_dict:
            # Training, which may follow, cannot save what inference mode has made.
            with torch.inference_mode(False):
                self.input_mean = torch.zeros_like(
                    state_dict[f"{prefix}input_mean"], device=self.weight.device
                )
        elif f"{prefix}weight" in state_dict and f"{prefix}input_mean" not in state_dict:
            self.input_mean = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def direction(self) -> Tensor:
        """V = W / ||W||, each filter divided by its norm: a detached copy of the weight's shape."""
        weight = self.weight.detach()
        return _directions(weight, filter_norms(weight))

    @property
    def scale(self) -> Tensor:
        """exp(g) = ||W||, the norm of each filter: a detached tensor of shape (out_channels,)."""
        return filter_norms(self.weight.detach()).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return torch's description of the convolution, with `stem=True` for a stem."""
        return super().extra_repr() + (", stem=True" if self.stem else "")


_DOCSTRING = """Convolve as `torch.nn.{name}` does, its weight W = exp(g) V initialised by CZMI.

    A drop-in for `torch.nn.{name}`: the same arguments, the same parameters, the same `state_dict`;
    `weight` is the materialised W (paper sections 3.1 and 3.2), trained by `FusedCZMSGD`. The bias
    starts at 0.

        >>> convolution = CZM{name}(3, 8, 3)
        >>> round(convolution.scale[0].item(), 3)
        0.8

    Args:
        stem: this convolution reads the image: its initialisation keeps the means of its slices,
            and `czm_param_groups` puts it into the group of that name.

    All other arguments, and the errors, are those of `torch.nn.{name}`.
    """


class CZMConv1d(_CZMConv, nn.Conv1d):
    __doc__ = _DOCSTRING.format(name="Conv1d")


class CZMConv2d(_CZMConv, nn.Conv2d):
    __doc__ = _DOCSTRING.format(name="Conv2d")


class CZMConv3d(_CZMConv, nn.Conv3d):
    __doc__ = _DOCSTRING.format(name="Conv3d")


CZM_CONVOLUTIONS = (CZMConv1d, CZMConv2d, CZMConv3d)
"""This package's for `czm_fused.init.CONVOLUTIONS`, in that order."""


class ExpScale(nn.Module):
    """Materialise W[f] = exp(g[f]) * V[f] (paper section 3.1) in one fused operation."""

    def forward(self, direction: Tensor, log_scale: Tensor) -> Tensor:
        """Return W of the shape of `direction` (filters, ...); `log_scale` has shape (filters,)."""
        weight: Tensor = ops.exp_scale(direction, log_scale)
        return weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return V = W / ||W|| and g = log ||W||, g in float32 at least; both 0 where W = 0."""
        # A weight may have one dimension, as the gain of an affine layer does.
        norms = filter_norms(weight.unsqueeze(-1))
        return _directions(weight, norms), torch.where(norms > 0, norms, 1).log()


def exp_scale(conv: _Module) -> _Module:
    """Train V and g of a convolution as parameters of their own, and return the convolution.

    The explicit form of W[f] = exp(g[f]) * V[f] (paper section 3.1) for any other optimizer: a
    `torch.nn.utils.parametrize` parametrization whose parameters are V,
    `conv.parametrizations.weight.original0`, and g, `conv.parametrizations.weight.original1`, of
    shape (filters,). W is kept, to rounding. `FusedCZMSGD` needs none of this.
    `torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")` leaves a plain convolution.

        >>> convolution = exp_scale(nn.Conv2d(3, 8, 3))
        >>> [tuple(p.shape) for p in convolution.parametrizations.weight.parameters()]
        [(8, 3, 3, 3), (8,)]

    Args:
        conv: a convolution, or any module whose `weight` has its filters along dimension 0.

    Raises:
        TypeError: `conv` is not an `nn.Module`.
        ValueError: `conv` has no weight with filters along dimension 0, is a transposed
            convolution, is lazy and has no weight yet, is parametrized already, has a weight that a
            hook computes (pruning, weight norm), or is scripted, traced or exported.
    """
    check_module(conv)
    if isinstance(conv, _ConvTransposeNd):
        raise ValueError(
            f"conv must have its filters along dimension 0, but {type(conv).__name__} "
            "has its input channels there; leave it as it is"
        )
    if parametrize.is_parametrized(conv, "weight"):
        raise ValueError(
            "the weight of conv must be a parameter, but is parametrized already; undo that with "
            'torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")'
        )
    weight: Any = getattr(conv, "weight", None)
    if is_lazy(weight):
        raise ValueError("the lazy module conv has no weight yet; run a forward pass first")
    if isinstance(weight, Tensor) and "weight" not in conv._parameters:
        raise ValueError(
            f"the weight of conv must be a parameter, but a hook computes it; {HOOK_REMEDY}"
        )
    if not isinstance(weight, nn.Parameter) or weight.dim() < 1:
        raise ValueError(
            "conv must have a parameter `weight` of shape (filters, ...), as the modules "
            f"{', '.join(c.__name__ for c in CONVOLUTIONS)} have, but was {type(conv).__name__}"
        )
    parametrize.register_parametrization(conv, "weight", ExpScale())
    return conv


class CZMBasicBlock(nn.Module):
    """Compute the residual unit of CIFAR ResNets without normalisation.

    relu(conv3x3(relu(conv3x3(x))) + shortcut(x)) * u, where the shortcut has no parameters (He et
    al., option A: subsampled by the stride, missing channels are zero) and u is the noise on the
    input of the next unit (paper section 4.4), drawn in training only. It keeps two activations for
    backward: the inputs of its convolutions. `torch.jit.script` and `torch.fx` take it as well.

        >>> unit = CZMBasicBlock(16, 32, stride=2, amplitude=0.1)
        >>> unit(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, `in_channels` or more.
        stride: of the first convolution and of the shortcut, 1 by default.
        amplitude: half the width of the noise on the output, in [0, 1); 0 (the default) in the
            last unit of a network. Also an attribute, which may be set at any time.
        branch_amplitude: the same of noise on the input of this unit's convolutions alone, not the
            shortcut's, for an input that is nowhere negative; 0 by default.
        bias: whether the convolutions have biases; False by default, as in the authors' runs.

    Raises:
        ValueError: `out_channels` is less than `in_channels`, or, in `forward`, an amplitude is
            outside [0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        amplitude: float = 0.0,
        branch_amplitude: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels must be at least in_channels, {in_channels}, but was {out_channels}"
            )
        self.amplitude = amplitude
        self.branch_amplitude = branch_amplitude
        self.stride = stride
        self.missing_channels = out_channels - in_channels
        self.conv1 = CZMConv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.conv2 = CZMConv2d(out_channels, out_channels, 3, padding=1, bias=bias)

    def shortcut(self, x: Tensor) -> Tensor:
        """Return `x` subsampled by the stride, with zeros for the channels that it lacks."""
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing_channels > 0:
            x = F.pad(x, [0, 0, 0, 0, 0, self.missing_channels])
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's output for `x` of shape (N, in_channels, H, W)."""
        functional.check_amplitude("branch_amplitude", self.branch_amplitude)
        branch = x
        if self.branch_amplitude > 0 and self.training:
            branch = residual_tail(x, None, self.branch_amplitude, True)
        branch = self.conv2(F.relu(self.conv1(branch), inplace=True))
        return residual_tail(branch, self.shortcut(x), self.amplitude, self.training)

    def extra_repr(self) -> str:
        """Return the settings that the children do not show."""
        branch = f", branch_amplitude={self.branch_amplitude}" if self.branch_amplitude else ""
        return f"amplitude={self.amplitude}{branch}"


class _ReLU6(torch.autograd.Function):
    """ReLU6 that saves its output, of which the next layer keeps the same storage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        output = F.relu6(x, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The gradient is 0 where the input is not within (0, 6), which is where the output is not.
        (output,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, output, 0.0, 6.0), None


def _relu6(x: Tensor, inplace: bool) -> Tensor:
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        # A compiler chooses for itself what to save.
        if torch.is_grad_enabled() and x.requires_grad and not needs_plain_torch():
            result: Tensor = _ReLU6.apply(x, inplace)
            return result
    return F.relu6(x, inplace)


torch.fx.wrap("_relu6")


class ReLU6(nn.ReLU6):
    """`nn.ReLU6` that keeps its output for backward, and not its input.

    torch's keeps both a copy of the input and, for the next layer, the output. `convert` puts this
    in its place: half the memory of a network whose convolutions are each followed by a ReLU6. As
    backward needs the output, nothing may change it in place; where something does, torch's stays.
    `inplace=True` writes the result over the input, as torch's does.

        >>> ReLU6()(torch.tensor([-1.0, 3.0, 9.0]))
        tensor([0., 3., 6.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return min(max(input, 0), 6)."""
        return _relu6(input, self.inplace)


class ChannelAffine(nn.Module):
    """Multiply every channel by a factor of its own and add a number of its own, x * weight + bias.

    `convert(model, from_pretrained=True)` puts it in the place of a BatchNorm that cannot be folded
    into a convolution. It takes no statistics, of the batch or of the past.

        >>> ChannelAffine(torch.tensor([2.0, 3.0]), torch.ones(2))(torch.ones(1, 2, 1)).flatten()
        tensor([3., 4.], grad_fn=<ViewBackward0>)

    Args:
        weight: the factors, of shape (channels,).
        bias: the summands, of shape (channels,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for `x` of shape (N, channels, ...), of its dtype."""
        # With the channels last, weight and bias broadcast whatever the number of dimensions, which
        # torch.fx does not know.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.addcmul(bias, x.movedim(1, -1), weight).movedim(-1, 1)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.weight.numel())


class Copy(nn.Module):
    """Return a copy of the input, which the next module may then change in place.

    `convert(model)` puts it in the place of a BatchNorm whose input is needed elsewhere.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the copy of `x`, with its memory layout."""
        return x.clone()


class ChannelNoise(nn.Module):
    """Multiply every channel of every sample by u ~ U(1 - amplitude, 1 + amplitude) in training.

    `convert(model, noise=amplitude)` puts it in the place of a BatchNorm (the noise of paper
    section 4.4). u is one of 255 numbers, equally far apart and around 1; backward needs its index,
    a byte for each sample and channel, and nothing else.

    Args:
        amplitude: half the width of the noise, in [0, 1). Also an attribute, which may be set at
            any time.
        copies: without noise, return a copy of the input, which the next module may then change in
            place, instead of the input itself. Default False.

    Raises:
        ValueError: `amplitude` is outside [0, 1), here or in `forward`.
    """

    def __init__(self, amplitude: float, *, copies: bool = False) -> None:
        super().__init__()
        functional.check_amplitude("amplitude", amplitude)
        self.amplitude = amplitude
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for `x` of shape (N, channels, ...), of its dtype."""
        functional.check_amplitude("amplitude", self.amplitude)
        if self.training and self.amplitude > 0:
            return _multiply_by_noise(x, self.amplitude)
        return x.clone() if self.copies else x

    def extra_repr(self) -> str:
        """Return the amplitude, and whether the input is copied."""
        return f"amplitude={self.amplitude}" + (", copies=True" if self.copies else "")
