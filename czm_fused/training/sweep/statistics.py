"""What a handful of final accuracies says: mean, deviation, interval, Welch's test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """A sample in short.

    Attributes:
        n: its size.
        mean: None for an empty sample.
        sd: its standard deviation with n - 1 in the denominator; None below two values.
    """

    n: int
    mean: float | None = None
    sd: float | None = None


def summarise(values: Sequence[float]) -> Summary:
    """Return the summary of `values`."""
    n = len(values)
    if n == 0:
        return Summary(n)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(n, mean)
    return Summary(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


def interval(sample: Summary, level: float = 0.95) -> tuple[float, float] | None:
    """Return the confidence interval of the mean by Student's t; None below two values.

    Args:
        level: the share of such intervals that hold the true mean, if the values are normal.
    """
    if sample.mean is None or sample.sd is None:
        return None
    from scipy import stats

    half = stats.t.ppf((1 + level) / 2, sample.n - 1) * sample.sd / math.sqrt(sample.n)
    return sample.mean - float(half), sample.mean + float(half)


def welch_p(first: Summary, second: Summary) -> float | None:
    """Return the two-sided p of Welch's t-test: two normal samples, deviations not assumed equal.

    None where it is undefined: a sample below two values, or none of them varies.
    """
    if first.sd is None or second.sd is None or first.sd == second.sd == 0:
        return None
    from scipy import stats

    result = stats.ttest_ind_from_stats(
        *(first.mean, first.sd, first.n), *(second.mean, second.sd, second.n), equal_var=False
    )
    return float(result.pvalue)
