"""Nothing is timed that does not compute the paper's step: the providers against the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from czm_fused.ops.step import reference

from .providers import Provider, Settings

STEPS = 3
SETTINGS = Settings(lr=0.1, luma=0.05)
"""Large enough that a part of the method that is missing moves weights far beyond rounding."""

# Of a stored number in a step: the weight and its momentum, and in the eager form dV and W too.
_STORED_ROUNDINGS = 4
# Of float32 in a step, sums over a filter apart: the equations have no more operations in a chain.
_ARITHMETIC_ROUNDINGS = 16


class DisagreementError(Exception):
    """A provider does not compute the paper's step."""


def check(
    providers: Sequence[Provider], weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[float]:
    """Compare fresh CZM providers with the oracle.

    Returns:
        The same as `errors`.

    Raises:
        DisagreementError: an error is above the tolerance, or not a number.
    """
    shares = errors(providers, weights, grads)
    for provider, share in zip(providers, shares, strict=True):
        if not share <= 1:
            raise DisagreementError(
                f"{provider.name} ({provider.backend}) is not the paper's step: after {STEPS} a "
                f"weight is off by {share:.3g} times what rounding can do"
            )
    return shares


def errors(
    providers: Sequence[Provider],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    min_filter_dim: float = 3,
) -> list[float]:
    """Step fresh providers `STEPS` times with `SETTINGS` and compare with the oracle in float64.

    Args:
        providers: built on `weights` and `grads`, not stepped yet.
        weights: where they started.
        grads: the gradients of every step.
        min_filter_dim: tensors of fewer dimensions take plain SGD; infinity for SGD throughout.

    Returns:
        For each provider, its largest error as a share of the tolerance (`tolerance`).
    """
    for provider in providers:
        provider.configure(SETTINGS)
        for _ in range(STEPS):
            provider.step()
    results = [provider.weights() for provider in providers]
    worst = [0.0] * len(providers)
    with torch.no_grad():
        for number, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            # One tensor at a time: VGG16 in float64 would be some gigabytes.
            expected = _oracle(weight, grad, weight.dim() >= min_filter_dim)
            allowed = tolerance(weight, expected)
            for index, result in enumerate(results):
                error = (result[number].to(torch.float64) - expected).abs().max().item()
                worst[index] = _larger(worst[index], error / allowed)
    return worst


def tolerance(weight: Tensor, expected: Tensor) -> float:
    """Return by how much rounding can move a weight of this tensor in `STEPS` steps.

    In each step a number is rounded `_STORED_ROUNDINGS` times to the weights' precision u and
    `_ARITHMETIC_ROUNDINGS` times to the arithmetic's precision v, and the sums over the n weights
    of a filter add a random walk of sqrt(n) roundings. Each is at most u or v times the largest
    weight plus the largest displacement; the latter counts STEPS times, because an error of the
    momentum enters every later update.
    """
    stored = torch.finfo(weight.dtype).eps / 2
    arithmetic = torch.finfo(reference.compute_dtype(weight.dtype)).eps / 2
    sums = math.sqrt(math.prod(weight.shape[1:])) if weight.dim() > 2 else 0.0
    step_error = _STORED_ROUNDINGS * stored + (_ARITHMETIC_ROUNDINGS + sums) * arithmetic
    largest = expected.abs().max() + STEPS * (expected - weight).abs().max()
    return STEPS * step_error * largest.item()


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a


def _oracle(weight: Tensor, grad: Tensor, is_filter: bool) -> Tensor:
    expected, grad = weight.to(torch.float64, copy=True), grad.to(torch.float64)
    momentum_buffer = torch.zeros_like(expected)
    options = {"lr": SETTINGS.lr, "momentum": SETTINGS.momentum}
    state: tuple[Tensor, ...] = ()
    if is_filter:
        log_scale = reference.initial_log_scale(expected)
        state = (log_scale, torch.zeros_like(log_scale))
        options |= {"zmg": SETTINGS.zmg, "luma": SETTINGS.luma}
    for _ in range(STEPS):
        reference.step_(expected, grad, momentum_buffer, *state, **options)
    return expected
