"""The check before the clock: nothing is measured that does not compute what it should."""

from __future__ import annotations

from torch import Tensor


class DisagreementError(Exception):
    """A provider does not compute what it is compared as."""


def require(name: str, what: str, error: float, bound: float) -> None:
    """Check that an error is within what rounding explains.

    Args:
        name: the provider.
        what: it should compute, and where it was compared.
        error: measured; NaN fails.
        bound: derived from the roundings of the computation.

    Raises:
        DisagreementError: the error is above the bound.
    """
    if not error <= bound:
        raise DisagreementError(
            f"{name} is not {what}: off by {error:.3g}, where rounding explains {bound:.3g}"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `expected`."""
    return float((actual - expected).norm() / expected.norm())
