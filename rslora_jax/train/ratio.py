"""A mean loss per token as a ratio of two sums, and its standard error."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """A ratio of two sums, and its standard error (NaN of one unit)."""

    value: float
    error: float


def ratio(sums_N: Any, counts_N: Any) -> Ratio:
    """Return the sum of `sums_N` over that of `counts_N`, and its standard error over the N units.

    Tokens of an example, or of a batch, are not independent, so these are the units that are counted. Both sums vary
    with them: the error is that of Cochran, Sampling Techniques (3rd ed., 1977), equation 6.13. Where all counts are 1,
    it is that of a mean.

    Args:
      sums_N: what each of N units adds up to, such as the loss of an example's tokens.
      counts_N: how many each unit holds.

    >>> ratio([2.0, 6.0], [2, 2])
    Ratio(value=2.0, error=1.0)
    """
    sums_N, counts_N = np.asarray(sums_N, np.float64), np.asarray(counts_N, np.float64)
    units, total = len(sums_N), float(counts_N.sum())
    value = float(sums_N.sum()) / total
    if units < 2:
        return Ratio(value, math.nan)
    squares = float(np.sum((sums_N - value * counts_N) ** 2))
    return Ratio(value, math.sqrt(units / (units - 1) * squares) / total)
