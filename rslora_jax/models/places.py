"""Where tokens stand, which of them see which, and the scores of those that do."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand: positions (B, T), negative for padding, and segments (B, T) or None.

    `is_plain` promises that the positions of each row are 0, 1, 2, ..., and that there are no segments.
    """

    positions: Array
    segments: Array | None = None
    is_plain: bool = dataclasses.field(default=False, metadata={"static": True})


def seen(queries: Places, keys: Places, window: Any = None) -> Array:
    """Say which keys each query sees, bool (B, T, S).

    Seen are those at a position neither negative nor later, of its own segment where there are segments, and, with
    a `window` (a number, or a scalar array), among so many positions that end with the query's.

    >>> seen(Places(jnp.array([[0, 1]])), Places(jnp.array([[-1, 0, 1]]))).tolist()
    [[[False, True, False], [False, True, True]]]
    >>> seen(Places(jnp.array([[3]])), Places(jnp.array([[0, 1, 2, 3]])), window=2).tolist()
    [[[False, False, True, True]]]
    """
    q, k = queries.positions[:, :, None], keys.positions[:, None, :]
    found = (k >= 0) & (k <= q)
    if window is not None:
        found &= k > q - window
    if queries.segments is not None and keys.segments is not None:
        found &= queries.segments[:, :, None] == keys.segments[:, None, :]
    return found


def scores_of(q: Array, k: Array, scale: float, cap: float | None) -> Array:
    """Return the scores (B, K, G, T, S) of queries (B, T, K, G, H) and keys (B, S, K, H), float32.

    They are multiplied by `scale`, and with a `cap` become cap * tanh(scores / cap).
    """
    return level_off(jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale, cap)


def level_off(x: Array, cap: float | None) -> Array:
    """Give cap * tanh(x / cap), of which no entry is beyond the cap; x where there is none.

    >>> [round(float(x), 3) for x in level_off(jnp.array([0.01, 1000.0]), 5.0)]
    [0.01, 5.0]
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
