"""center_(): convolutions that read their input relative to its mean."""

# torch is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from czm_fused._internal.holders import shared_parameters
from czm_fused._internal.replacement import computes_convolution
from czm_fused._internal.sharding import is_dtensor, reshard
from czm_fused._internal.signals import input_of
from czm_fused.example import hooked, preserved, run_checked
from czm_fused.init import CONVOLUTIONS, check_module, named_convolutions
from czm_fused.nn import CZM_CONVOLUTIONS, mean_response
from czm_fused.ops.step.spec import compute_dtype

CENTERED = dict(zip(CONVOLUTIONS, CZM_CONVOLUTIONS, strict=True))
"""torch's convolutions, and those that can read their input relative to its mean."""

_UNCENTERED = "_class_without_mean"
"""The attribute for torch's class of a convolution whose class `center_` has changed."""


def center_(model: nn.Module, example_input: Any) -> int:
    """Let every convolution of `model` read its input relative to its mean, in place.

    The input's mean per channel, mu, is measured on `example_input` and kept in the buffer
    `input_mean`; the convolution then computes

        y[f] = W[f] * x + b[f] - sum_c mu[c] sum_t W[f, c, t]
        b[f] <- b[f] + sum_c (mu[c] - mu_before[c]) sum_t W[f, c, t]

    so that the outputs of the model stay what they were, to rounding. What changes is training:
    an update of W no longer shifts the mean of y, and the gradient of W no longer holds the large
    part that only does so. It is what zero-mean gradients do for filters of many taps (paper
    section 3.3), for filters of any shape and without losing what the means of filters learn
    (Schraudolph, "Centering neural network gradients", 1998).

    Means move as the network learns, so call this again every 20 steps or so: a call costs one
    forward pass without gradients. `FusedCZMSGD`, or any other optimizer, trains W and b as usual.

    A convolution of exactly torch's class becomes the `CZMConv` of its number of dimensions; so
    call this first before the model is compiled or sharded. Convolutions without a bias or with one
    that another module shares, of classes of their own, complex, with a hook or parametrization on
    the weight, or that read nothing, are left as they are. Under `torch.distributed` every process
    has to call this; the means are those of all their inputs. Averaged copies of the model are made
    after the first call and average buffers as well, as
    `torch.optim.swa_utils.AveragedModel(model, use_buffers=True)` does.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> center_(network, torch.rand(16, 3, 8, 8))
        2
        >>> network[2].input_mean.shape
        torch.Size([8])

    Args:
        model: the network.
        example_input: a batch of real inputs: a tensor, a tuple of positional or a dictionary of
            keyword arguments for `model`. The pass is in eval mode and leaves modes, buffers and
            generators as they were.

    Returns:
        The number of convolutions whose means this call has set: those that read samples.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: no convolution of the model can be centred, none of those reads samples of
            `example_input`, the model fails on it in eval mode, a mean is not finite, or the model
            is scripted, traced or exported, or has a lazy convolution that has no weight yet. The
            model is as it was.
    """
    check_module(model)
    shared = shared_parameters(model)
    convolutions = [
        (name, convolution)
        for name, convolution in named_convolutions(model).items()
        if _can_be_centered(convolution) and id(convolution.bias) not in shared
    ]
    if not convolutions:
        raise ValueError(
            "model must have a convolution of real numbers with a bias of its own, of a class of "
            "torch or of this package, but had none; convert() adds biases, and fully_shard comes "
            "after the first call"
        )
    means = _Means(dict(convolutions))
    try:
        with preserved(model), hooked(means.hooks()):
            model.eval()
            run_checked(model, example_input)
    finally:
        reshard(model)
    measured = means.averaged()
    if not measured:
        raise ValueError(
            "example_input must have samples that reach a convolution of the model with a bias of "
            "its own, but none did; pass a batch of what the model takes in training"
        )
    for name, mean in measured.items():
        if not bool(mean.isfinite().all()):
            raise ValueError(
                f"example_input must lead to finite activations, but the mean of what {name!r} "
                "reads is not; lower the rate, or look for a division or an overflow before it"
            )
    for name, convolution in convolutions:
        if name in measured:
            _set_mean(convolution, measured[name])
    return len(measured)


def uncenter_(model: nn.Module) -> None:
    """Move the means that `center_` has set into the biases, in place, and forget them.

    The outputs of the model stay what they were, to rounding; its `state_dict` is that of a plain
    network again, and convolutions whose class `center_` has changed are of torch's own class.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> _ = center_(network, torch.rand(16, 3, 8, 8))
        >>> uncenter_(network)
        >>> list(network.state_dict())
        ['0.weight', '0.bias']

    Args:
        model: the network.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: modules came to share the bias of a centred convolution, or `model` is scripted,
            traced or exported, or has a lazy convolution that has no weight yet. Nothing is changed
            then.
    """
    convolutions: dict[str, Any] = dict(named_convolutions(model))
    centered: dict[str, Any] = {
        name: convolution
        for name, convolution in convolutions.items()
        if isinstance(convolution, CZM_CONVOLUTIONS) and convolution.input_mean is not None
    }
    shared = shared_parameters(model)
    for name, convolution in centered.items():
        if id(convolution.bias) in shared:
            raise ValueError(
                f"the bias of {name!r} must be its own to take up the mean, but another module has "
                "it too; give each a copy"
            )
    reshard(model)
    for convolution in centered.values():
        # Without a bias, the mean has no effect.
        if convolution.bias is not None:
            _add_to_bias(convolution, -convolution.input_mean)
        convolution.input_mean = None
    for convolution in convolutions.values():
        before = vars(convolution).get(_UNCENTERED)
        # A class that sharding has made of it stays.
        if type(convolution) is CENTERED.get(before):
            delattr(convolution, _UNCENTERED)
            convolution.__class__ = before
            del convolution.input_mean
            if not convolution.stem:
                del convolution.stem


class _Means:
    """Measures the mean per channel of what convolutions read, over all their runs."""

    def __init__(self, convolutions: dict[str, Any]) -> None:
        self.convolutions = convolutions
        # Of each channel, the sum and, last, the number of what was summed.
        self.sums: dict[str, Tensor] = {}

    def hooks(self) -> Iterator[Any]:
        for name, convolution in self.convolutions.items():
            yield convolution.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._measure(name, input_of(args, kwargs)),
                with_kwargs=True,
            )

    def _measure(self, name: str, x: Tensor) -> None:
        channels = x.dim() - self.convolutions[name].weight.dim() + 1
        others = [each for each in range(x.dim()) if each != channels]
        sums = x.detach().sum(dim=others, dtype=compute_dtype(x.dtype))
        count = sums.new_full((1,), x.numel() / max(1, len(sums)))
        sums = torch.cat([sums, count])
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def averaged(self) -> dict[str, Tensor]:
        """Return the means by name of what was read, over the inputs of all processes."""
        sums = self.sums
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = self._of_all_processes()
        # A batch may be empty, as that of the regions which a detector looks at further.
        return {name: each[:-1] / each[-1] for name, each in sums.items() if each[-1] > 0}

    def _of_all_processes(self) -> dict[str, Tensor]:
        # In one order and dtype on all processes, of whatever ran on this one.
        weights = {name: each.weight for name, each in self.convolutions.items()}
        is_double = any(weight.dtype == torch.float64 for weight in weights.values())
        ran = next(iter(self.sums.values()), next(iter(weights.values())))
        sizes = [each.in_channels + 1 for each in self.convolutions.values()]
        dtype = torch.float64 if is_double else torch.float32
        flat = torch.zeros(sum(sizes), dtype=dtype, device=ran.device)
        named = dict(zip(weights, flat.split(sizes), strict=True))
        for name, its_sums in self.sums.items():
            named[name].copy_(its_sums)
        torch.distributed.all_reduce(flat)
        return {
            name: part.to(self.sums.get(name, part).device, compute_dtype(weights[name].dtype))
            for name, part in named.items()
        }


def _can_be_centered(convolution: Any) -> bool:
    return (
        (type(convolution) in CONVOLUTIONS or isinstance(convolution, CZM_CONVOLUTIONS))
        and computes_convolution(convolution)
        and convolution.bias is not None
        and not convolution.weight.is_complex()
    )


def _set_mean(convolution: Any, mean: Tensor) -> None:
    if type(convolution) in CENTERED:
        # The module stays itself, with its name, hooks and parameters.
        setattr(convolution, _UNCENTERED, type(convolution))
        convolution.__class__ = CENTERED[type(convolution)]
        convolution.stem = getattr(convolution, "stem", False)
        convolution.register_buffer("input_mean", None)
    if convolution.input_mean is None:
        # Training, which may follow, cannot save what inference mode has made.
        with torch.inference_mode(False):
            convolution.input_mean = torch.zeros_like(mean)
    # The bias makes up for what the buffer holds, which may be of less precision than the mean.
    mean = mean.to(convolution.input_mean.dtype).to(mean.dtype)
    _add_to_bias(convolution, mean - convolution.input_mean)
    convolution.input_mean.copy_(mean)


@torch.no_grad()
def _add_to_bias(convolution: Any, mean: Tensor) -> None:
    weight, bias = convolution.weight, convolution.bias
    is_sharded = is_dtensor(weight)
    response: Tensor = mean_response(
        weight.full_tensor() if is_sharded else weight,
        mean,
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.groups,
    )
    if is_sharded:
        from torch.distributed.tensor import distribute_tensor

        response = distribute_tensor(response, bias.device_mesh, bias.placements)
    bias.add_(response)
