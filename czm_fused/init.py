"""CZMI: the channel-wise zero-mean initialisation of convolutions (paper section 3.2)."""

# torch is typed in part.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from czm_fused._internal.sharding import check_not_sharded
from czm_fused._internal.undo import undone_on_error

GAIN = 0.8
"""The norm that every filter starts with: exp(g) of the paper's section 3.1."""

HOOK_REMEDY = (
    "make the weight a parameter first with torch.nn.utils.prune.remove, remove_weight_norm or "
    "remove_spectral_norm, or, under FullyShardedDataParallel, do this before wrapping"
)
_PARAMETRIZATION_REMEDY = (
    "initialise before registering it, or remove it with "
    "torch.nn.utils.parametrize.remove_parametrizations"
)

_Module = TypeVar("_Module", bound=nn.Module)

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The modules whose weights are filters along dimension 0; transposed convolutions are not."""

_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
"""What those modules call, in that order."""


def czm_weight_(
    weight: Tensor,
    *,
    gain: float = GAIN,
    zero_mean: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Initialise the weight of one convolution in place, and return it.

    X ~ U(-1, 1); every spatial slice of more than one tap loses its own mean; every filter is
    divided by its Euclidean norm and multiplied by `gain` (paper section 3.2). A filter of norm 0
    stays 0. Half types are computed in float32.

        >>> weight = czm_weight_(torch.empty(8, 3, 3, 3))
        >>> bool(weight.mean(dim=(2, 3)).abs().max() < 1e-6)
        True

    Args:
        weight: of shape (filters, channels, taps...), 2 dimensions or more, any memory layout.
        gain: the norm of every filter, 0.8 by default.
        zero_mean: False keeps the means, as the layer that reads the image and depthwise ones do.
        generator: the source of the numbers; torch's default generator if None.

    Raises:
        ValueError: `gain` is not a positive number, or `weight` has fewer than 2 dimensions or is
            not initialised.
    """
    check_positive("gain", gain)
    if is_lazy(weight):
        raise ValueError("weight has no shape yet; run a forward pass of its lazy module first")
    if weight.dim() < 2:
        raise ValueError(
            f"weight must have the dimensions (filters, channels, ...), but its shape was "
            f"{tuple(weight.shape)}"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        filters = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        filters.uniform_(-1, 1, generator=generator)
        if zero_mean and weight.shape[2:].numel() > 1:
            filters -= filters.mean(dim=tuple(range(2, filters.dim())), keepdim=True)
        norm = filters.flatten(1).norm(dim=1)
        scale = gain / torch.where(norm > 0, norm, 1)
        return weight.copy_(filters * scale.view(-1, *[1] * (filters.dim() - 1)))


def czm_init_(
    module: _Module,
    *,
    example_input: Any = None,
    gain: float | None = None,
    zero_mean: bool | None = None,
    stem: nn.Module | str | None = None,
    generator: torch.Generator | None = None,
) -> _Module:
    """Initialise every convolution of `module` in place by CZMI, and return `module`.

    Weights as in `czm_weight_`, biases 0 (paper section 3.2). The stem and depthwise convolutions
    keep the means of their slices; so do all with `example_input`, unless `zero_mean` is True.
    Parameters that require no gradient are set as well. A parametrized weight is assigned, so that
    its parametrization stores the parameters that it is computed from. Transposed convolutions,
    whose filters are not along dimension 0, stay as they are.

        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> round(czm_init_(network)[2].weight[0].norm().item(), 3)
        0.8

    Args:
        module: a convolution, or a network of them.
        example_input: a batch of real inputs, 16 or more: a tensor, a tuple of positional or a
            dictionary of keyword arguments for `module`. If given,
            `czm_fused.calibration.calibrate_` then scales every convolution so that its output on
            this batch starts with the same spread. If None, every filter keeps the norm `gain`.
        gain: the norm of every filter, 0.8 by default, as in the paper; not with `example_input`.
        zero_mean: whether spatial slices start with mean 0. By default True, as in the paper, but
            False with `example_input`: without a shortcut beside them, such filters pass little of
            what tells images apart.
        stem: the convolution that reads the image, as a module or by its dotted name; by default
            those built with `CZMConv*(..., stem=True)`.
        generator: the source of the weights; torch's default generator if None.

    Raises:
        TypeError: `module` is not an `nn.Module`.
        ValueError: `gain` is not a positive number, or given with `example_input`; `stem` is not a
            convolution of `module`; a convolution is lazy and not initialised, or its weight cannot
            be set, because a hook (pruning, weight norm, FSDP1) or a parametrization (spectral
            norm) computes another; `module` is scripted, traced, exported or sharded; or as in
            `calibrate_`. The module is as it was.

    Warns:
        UserWarning: as in `calibrate_`.
    """
    if example_input is not None and gain is not None:
        raise ValueError(
            f"gain must be None with example_input, which measures the gains, but was {gain}"
        )
    gain = GAIN if gain is None else gain
    check_positive("gain", gain)
    if zero_mean is None:
        zero_mean = example_input is None
    convolutions = named_convolutions(module)
    check_not_sharded(module)
    stems = find_stems(convolutions, stem)
    with undone_on_error(module, convolutions.values()):
        init_convolutions_(convolutions, stems, gain, zero_mean, generator)
        if example_input is not None:
            from czm_fused.calibration import calibrate_

            calibrate_(module, example_input, weigh_taps=not zero_mean)
    return module


def init_convolutions_(
    convolutions: Mapping[str, Convolution],
    stems: Iterable[nn.Module],
    gain: float,
    zero_mean: bool,
    generator: torch.Generator | None,
) -> None:
    """Initialise convolutions in place as `czm_init_` does.

    Args:
        convolutions: by their dotted names.
        stems: those of them that keep their means, as depthwise ones do.
        gain: the norm of every filter.
        zero_mean: whether the spatial slices of the others lose their means.
        generator: the source of the weights.

    Raises:
        ValueError: a weight cannot be set.
    """
    _check_settable(convolutions)
    for name, convolution in convolutions.items():
        keeps_mean = not zero_mean or convolution in stems or is_depthwise(convolution)
        options: dict[str, Any] = {
            "gain": gain,
            "zero_mean": not keeps_mean,
            "generator": generator,
        }
        if parametrize.is_parametrized(convolution, "weight"):
            weight = torch.empty_like(convolution.weight, requires_grad=False)
            _assign(name, convolution, "weight", czm_weight_(weight, **options))
        else:
            czm_weight_(convolution.weight, **options)
        if "input_mean" in convolution._buffers:
            # Of what the weights before made.
            convolution._buffers["input_mean"] = None
        if parametrize.is_parametrized(convolution, "bias"):
            bias: Any = convolution.bias
            _assign(name, convolution, "bias", torch.zeros_like(bias))
        elif convolution.bias is not None:
            nn.init.zeros_(convolution.bias)


def _check_settable(convolutions: Mapping[str, Convolution]) -> None:
    """Raise a ValueError if the next forward pass would replace what is assigned to one."""
    for name, convolution in convolutions.items():
        for key in ("weight", "bias"):
            if key in convolution._parameters or parametrize.is_parametrized(convolution, key):
                continue
            raise ValueError(
                f"the {key} of convolution {name!r} must be a parameter, but a hook computes it; "
                f"{HOOK_REMEDY}"
            )
        if "weight" in convolution._parameters and convolution.weight.dim() < 3:
            raise ValueError(
                f"the weight of convolution {name!r} must have the dimensions (filters, channels, "
                f"taps...), but its shape was {tuple(convolution.weight.shape)}; initialise the "
                "model before a wrapper flattens it, as FullyShardedDataParallel does"
            )


def _assign(name: str, convolution: Convolution, key: str, value: Tensor) -> None:
    """Assign a parametrized tensor, and raise a ValueError unless it then has that value."""
    parametrizations: Any = convolution.parametrizations
    kinds = ", ".join(type(each).__name__ for each in parametrizations[key])
    try:
        setattr(convolution, key, value)
    except Exception as error:
        raise ValueError(
            f"the {key} of convolution {name!r} must be settable, but its parametrization {kinds} "
            f"has no inverse ({type(error).__name__}: {error}); {_PARAMETRIZATION_REMEDY}"
        ) from error
    computed = getattr(convolution, key).detach()
    if computed.is_meta:
        return
    # The parametrization may round a few times in the dtype of the weight.
    tolerance = 64 * torch.finfo(value.dtype).eps
    if not torch.allclose(computed, value, rtol=tolerance, atol=tolerance * GAIN):
        raise ValueError(
            f"the {key} of convolution {name!r} must keep the value assigned to it, but its "
            f"parametrization {kinds} computes another; {_PARAMETRIZATION_REMEDY}"
        )


def check_module(model: Any) -> None:
    """Raise an error unless `model` is a module whose layers Python can see.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: it, or a module in it, was scripted, exported, traced by torch.jit, or traced by
            torch.fx to the functions of its convolutions.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        remedy = ""
        if isinstance(model, Iterable):
            remedy = "; pass the model itself, whose modules tell which parameters are filters"
        raise TypeError(f"model must be a torch.nn.Module, but was of type {kind}{remedy}")
    for name, module in model.named_modules():
        compiler = ""
        if isinstance(module, torch.jit.ScriptModule):
            compiler = "scripted or traced by torch.jit"
        elif isinstance(module, torch.fx.GraphModule):
            targets = [node.target for node in module.graph.nodes]
            if any(
                isinstance(target, torch._ops.OpOverload)
                and "conv" in target.name().rpartition("::")[2]
                for target in targets
            ):
                compiler = "exported by torch.export"
            # torch.fx looks into modules that are not of torch.nn, as those of czm_fused.nn.
            elif any(target in _FUNCTIONS for target in targets):
                compiler = "traced by torch.fx through its convolutions"
        if compiler:
            what = f"its module {name!r}" if name else "it"
            raise ValueError(
                f"model must consist of torch's own modules, but {what} is {compiler}, which "
                "leaves no convolution to find; pass the model that it was made from"
            )


def named_convolutions(module: nn.Module) -> dict[str, Convolution]:
    """Return the convolutions of `module`, transposed ones excepted, by their dotted names.

    Raises:
        TypeError, ValueError: as in `check_module`, or a lazy convolution has no weight yet.
    """
    check_module(module)
    convolutions: dict[str, Convolution] = {}
    for name, child in module.named_modules():
        if not isinstance(child, CONVOLUTIONS):
            continue
        # A parametrized weight has a shape, and reading it would compute it.
        if not parametrize.is_parametrized(child, "weight") and is_lazy(child.weight):
            raise ValueError(
                f"the lazy convolution {name!r} has no weight yet; run a forward pass first"
            )
        convolutions[name] = child
    return convolutions


def is_depthwise(convolution: _ConvNd) -> bool:
    """Return True if every filter reads one channel of several."""
    return convolution.groups == convolution.in_channels > 1


def find_stems(
    convolutions: dict[str, Convolution], stem: nn.Module | str | None
) -> tuple[nn.Module, ...]:
    """Return the convolution that `stem` names, or, if it is None, those built as stems.

    Raises:
        ValueError: `stem` is none of `convolutions`.
    """
    if stem is None:
        return tuple(c for c in convolutions.values() if getattr(c, "stem", False) is True)
    if isinstance(stem, str):
        if stem not in convolutions:
            raise ValueError(
                f"stem must name a convolution of the model, one of {_some(convolutions)}; "
                f"but was {stem!r}"
            )
        return (convolutions[stem],)
    if all(stem is not convolution for convolution in convolutions.values()):
        raise ValueError(
            f"stem must be a convolution of the model, one of {_some(convolutions)}; "
            f"but was {stem!r}"
        )
    return (stem,)


def _some(convolutions: dict[str, Convolution], most: int = 8) -> str:
    names = [repr(name) for name in convolutions]
    if not names:
        return "none, as it has no convolution"
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless `value`, the argument `name`, is a positive number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, but was {value}")
