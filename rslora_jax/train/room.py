"""In how many parts a batch is to be taken so that its step fits a device, and the largest batch that fits whole."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rslora_jax.train.footprint import Memory, fits, usable

MOST_ROWS = 4096  # of more, nobody asks how many there may be
_TRIES = 3  # sizes to compile on the way to the largest batch


class Largest(NamedTuple):
    """Hold the largest batch that fits taken whole, in rows, and whether it was compiled or is told from others."""

    rows: int
    compiled: bool


def divisors(rows: int) -> list[int]:
    """Return in how many parts so many rows can be taken.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, rows + 1) if rows % n == 0]


def fewest_parts(memory: Callable[[int], Memory | None], parts: Sequence[int], limit: int | None) -> int:
    """Return the smallest number of parts with which a step fits a device.

    Args:
      memory: what a step takes that takes its batch in so many parts, None for more than there is; asked about as
        many times as there are doublings among them.
      parts: the numbers of parts to choose from, rising.
      limit: the bytes of a device (`footprint.room`).

    Raises:
      ValueError: none of them fits, or the device does not tell its memory.

    >>> def memory(parts):
    ...     found = dict.fromkeys(["base", "adapters", "start", "optimizer", "rest", "gradients"], 2)
    ...     return Memory(**found, activations=80 // parts)
    >>> fewest_parts(memory, [1, 2, 4, 8], limit=60)
    2
    """
    if limit is None:
        raise ValueError("the device does not tell how much memory it has: say in how many parts to take a batch")

    def does(n: int) -> bool:
        found = memory(parts[n])
        return found is not None and bool(fits(found.total, limit))

    if does(0):
        return parts[0]
    low, high = 0, len(parts) - 1  # `low` does not fit
    if high == 0 or not does(high):
        what = f"its batch in {parts[-1]} parts" if high else "one row at a time"
        raise ValueError(
            f"a step that takes {what} does not fit a device of {limit / 1e9:.1f} GB either: compute more activations "
            "again (remat), shorten the rows, or hold the base in fewer bits"
        )
    while high - low > 1:
        between = (low + high) // 2
        low, high = (low, between) if does(between) else (between, high)
    return parts[high]


def largest_batch(
    total: Callable[[int], int | None], known: Mapping[int, int], unit: int, limit: int, deadline: float
) -> Largest | None:
    """Find the largest batch that fits a device taken whole: told from two sizes, and then compiled.

    Args:
      total: the bytes of a step with a batch of so many rows; None where they are more than there are.
      known: such bytes that are known, of one size at least.
      unit: of how many rows a batch has a multiple.
      limit: the bytes of a device.
      deadline: by `time.monotonic`, when to ask no more.

    Returns:
      At most `MOST_ROWS`; None where it cannot be told in time, or nothing fits.

    >>> largest_batch(lambda rows: 10 + 7 * rows, {2: 24}, unit=2, limit=100, deadline=time.monotonic() + 1)
    Largest(rows=10, compiled=True)
    """
    found = dict(known)

    def ask(rows: int) -> None:
        bytes_ = total(rows)
        found[rows] = 2 * limit if bytes_ is None else bytes_

    if len(found) == 1 and time.monotonic() < deadline:
        ask(2 * max(found))
    if len(found) == 1:
        return None
    guess = _told(found, limit, unit)
    for _ in range(_TRIES):
        if guess is None or guess in found or time.monotonic() > deadline:
            break
        ask(guess)
        if fits(found[guess], limit):
            return Largest(guess, True)
        guess = _told(found, limit, unit)
    return Largest(guess, guess in found) if guess else None


def _told(found: Mapping[int, int], limit: int, unit: int) -> int | None:
    """Tell from the bytes of some sizes the largest that fits, by the line through the two next to it.

    >>> _told({1: 20, 2: 30}, 100, unit=1), _told({1: 20, 2: 30, 8: 110}, 100, unit=1), _told({4: 20, 8: 20}, 99, 4)
    (8, 6, None)
    """
    rows = sorted(found)
    pairs = [*itertools.pairwise(rows)]
    around = [pair for pair in pairs if fits(found[pair[0]], limit) and not fits(found[pair[1]], limit)]
    low, high = (around or pairs[-1:])[0]
    slope = (found[high] - found[low]) / (high - low)
    if slope <= 0:
        return None
    most = low + int((usable(limit) - found[low]) // slope)
    return min(most, MOST_ROWS) // unit * unit or None if most > 0 else None
