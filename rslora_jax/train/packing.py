"""Which examples share a row of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int, *, seed: int = 0, window: int = 4096) -> list[tuple[int, ...]]:
    """Put examples of the given lengths into rows of `capacity`, in few rows: index tuples, each index once.

    The examples are shuffled, and each `window` of them is packed by first-fit decreasing: longest first,
    into the first row that has room. The shuffle makes chance, not length, decide who sits with whom, as far
    as the packing allows; the window bounds the work for large data sets.

    Raises:
      ValueError: a length is below 1 or above the capacity, or the window is below 1.

    >>> sorted(sorted(row) for row in pack([5, 2, 3, 4], capacity=7))
    [[0, 1], [2, 3]]
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    wrong = np.flatnonzero((lengths_N < 1) | (lengths_N > capacity))
    if len(wrong):
        raise ValueError(f"example {wrong[0]} has length {lengths_N[wrong[0]]}, which is not in 1..{capacity}")
    order_N = np.random.default_rng(seed).permutation(len(lengths_N))
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(order_N), window):
        rows += _first_fit_decreasing(lengths_N, order_N[start : start + window], capacity)
    return rows


def _first_fit_decreasing(lengths_N: np.ndarray, chosen_M: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    longest_first_M = chosen_M[np.argsort(-lengths_N[chosen_M], kind="stable")]
    room_R = np.full(len(chosen_M), capacity)
    rows: list[list[int]] = []
    for index in longest_first_M.tolist():
        length = lengths_N[index]
        # The first row not yet opened always has room, so argmax always finds one.
        row = int(np.argmax(room_R[: len(rows) + 1] >= length))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room_R[row] -= length
    return [tuple(row) for row in rows]
