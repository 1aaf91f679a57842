"""CZMI: the channel-wise zero-mean initialisation of convolutions (paper section 3.2)."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

GAIN = 0.8
"""The norm that every filter starts with: exp(g) of the paper's section 3.1."""

_Module = TypeVar("_Module", bound=nn.Module)

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The modules whose weights are filters along dimension 0; transposed convolutions are not."""


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

    Args:
        weight: of shape (filters, channels, taps...), 2 dimensions or more, any memory layout.
        gain: the norm of every filter, 0.8 by default.
        zero_mean: False keeps the means, as the layer that reads the image does.
        generator: where the numbers come from; torch's default generator if None.

    Raises:
        ValueError: `gain` is not a positive number, or `weight` has fewer than 2 dimensions or is
            not initialised.
    """
    check_gain(gain)
    if is_lazy(weight):
        raise ValueError("weight has no shape yet: run a forward pass of its lazy module first")
    if weight.dim() < 2:
        raise ValueError(
            f"weight must have the dimensions (filters, channels, ...), but had {weight.dim()}"
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
    gain: float = GAIN,
    stem: nn.Module | str | None = None,
    generator: torch.Generator | None = None,
) -> _Module:
    """Initialise every convolution of `module` in place by CZMI, and return `module`.

    Weights as in `czm_weight_`, biases 0 (paper section 3.2). Transposed convolutions, whose
    filters do not lie along dimension 0, are left as they are.

    Args:
        module: a convolution or anything that holds convolutions.
        gain: the norm of every filter, 0.8 by default.
        stem: the convolution that reads the image, as a module or by its dotted name; it keeps the
            means of its slices. If None, those built with `CZMConv*(..., stem=True)`.
        generator: where the numbers come from; torch's default generator if None.

    Raises:
        ValueError: `gain` is not a positive number, `stem` is not a convolution of `module`, or a
            lazy convolution is not initialised yet. Nothing has been changed then.
    """
    check_gain(gain)
    convolutions = named_convolutions(module)
    stems = find_stems(convolutions, stem)
    for convolution in convolutions.values():
        zero_mean = convolution not in stems
        if parametrize.is_parametrized(convolution, "weight"):
            # What is stored is not the weight: assigning runs the parametrization backwards.
            weight = torch.empty_like(convolution.weight, requires_grad=False)
            convolution.weight = czm_weight_(
                weight, gain=gain, zero_mean=zero_mean, generator=generator
            )
        else:
            czm_weight_(convolution.weight, gain=gain, zero_mean=zero_mean, generator=generator)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return module


def named_convolutions(module: nn.Module) -> dict[str, Convolution]:
    """Return the convolutions of `module`, transposed ones excepted, by their dotted names.

    Raises:
        ValueError: a lazy convolution has no weight yet.
    """
    convolutions: dict[str, Convolution] = {}
    for name, child in module.named_modules():
        if not isinstance(child, CONVOLUTIONS):
            continue
        # A parametrized weight has a shape, and reading it would compute it.
        if not parametrize.is_parametrized(child, "weight") and is_lazy(child.weight):
            raise ValueError(
                f"the lazy convolution {name!r} has no weight yet: run a forward pass first"
            )
        convolutions[name] = child
    return convolutions


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


def check_gain(gain: float) -> None:
    """Raise a ValueError unless `gain` is a positive number."""
    if not 0 < gain < float("inf"):
        raise ValueError(f"gain must be a positive number, but was {gain}")
