"""The check that a method computes what it is another form of, before anything is measured."""

from __future__ import annotations

import torch

from .training import Training


def disagreement(training: Training, reference: Training) -> str | None:
    """Compare loss and gradients with another method's on the same images, weights and noise.

    Two forms of one computation round differently in every layer. How much that moves the gradients
    depends on the network (BatchNorm's and the ReLUs' Jacobians amplify it, in ResNet110 to
    thousands of eps), and is measured: by gradients at weights which are changed at random by up to
    half an eps. The bound is 16 times that, as every activation is rounded, not weights alone.
    Under autocast the bound is wide for deep networks: what it says of them, float32 says better.

    Args:
        training: what is checked.
        reference: what it is checked against. Its weights are changed.

    Returns:
        What differs, or None.
    """
    loss, gradients = training.gradients()
    expected_loss, expected = reference.gradients()
    _round_differently(reference)
    _, rounded = reference.gradients()
    bound = 16 * float((rounded - expected).norm() / expected.norm())
    difference = float((gradients - expected).norm() / expected.norm())
    if difference <= bound and abs(loss - expected_loss) <= bound * abs(expected_loss):
        return None
    return (
        f"{training.method} does not compute what {reference.method} does: loss {loss:.6g} against "
        f"{expected_loss:.6g}, gradients apart by {difference:.1e} of their norm, more than "
        f"{bound:.1e}"
    )


def _round_differently(training: Training) -> None:
    epsilon = training.precision.epsilon(training.images.device)
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * epsilon)
