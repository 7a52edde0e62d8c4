"""The standard error of a mean loss: it is a ratio of two sums, over parts that are drawn and not over tokens."""

from __future__ import annotations

import math

import numpy as np


def ratio_error(sums_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Return the standard error of `sums_N.sum() / counts_N.sum()` over N parts drawn at random; NaN of one part.

    Cochran, Sampling Techniques (3rd ed., 1977), equation 6.13.

    >>> ratio_error(np.array([2.0, 6.0]), np.array([2.0, 2.0]))
    1.0
    """
    parts, total = len(sums_N), float(counts_N.sum())
    if parts < 2:
        return math.nan
    rest_N = sums_N - float(sums_N.sum()) / total * counts_N
    return math.sqrt(parts / (parts - 1) * float(np.sum(rest_N**2))) / total
