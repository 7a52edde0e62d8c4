"""Attention that never holds the scores of all queries and all keys: some of each at a time, with an online softmax.

The value is that of arXiv 2112.05682 and 2205.14135 (algorithm 1), the derivative that of the latter (algorithm 4):
scores are formed again there, from the queries, the keys and the logarithm of each query's normaliser. Memory grows
with queries plus keys, not with their product.

Shapes in names are those of `rslora_jax.models.decoder`; C is a chunk of queries, D one of keys, M are all
the rows of C queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rslora_jax.models.places import Places, level_off, seen

_NONE = -1e30  # the score of a key that is not seen


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def chunked(
    q_BxTxKxGxH: Array,
    k_BxSxKxH: Array,
    v_BxSxKxH: Array,
    queries: Places,
    keys: Places,
    window: Array | None,
    scale: float,
    cap: float | None,
    chunk: int,
) -> Array:
    """Attend, some queries and keys at a time; a query that sees no key gives zeros.

    Args:
      q_BxTxKxGxH: queries, G for each of K heads of keys.
      k_BxSxKxH, v_BxSxKxH: keys and values.
      queries, keys, window: say what is seen, as for `seen`.
      scale: what scores are multiplied by.
      cap: scores become cap * tanh(scores / cap).
      chunk: how many queries and keys at a time.

    Returns:
      (B, T, K, G, H) in the queries' dtype; scores and softmax are float32.

    >>> q, kv, at = jnp.ones((1, 6, 2, 3, 8)), jnp.ones((1, 6, 2, 8)), Places(jnp.arange(6)[None])
    >>> chunked(q, kv, kv, at, at, None, 0.5, None, 4).shape
    (1, 6, 2, 3, 8)
    """
    return _forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, queries, keys, window, scale, cap, chunk)[0]


def _forward(
    q: Array, k: Array, v: Array, queries: Places, keys: Places, window: Any, scale: float, cap: Any, chunk: int
) -> tuple[Array, Array]:
    """Return the value, and the logarithm of each query's normaliser (B, K, G, T)."""
    q_chunks, k_chunks = _cut((q, queries), chunk), _by_head(_cut((k, v, keys), chunk))
    G = q.shape[3]

    def of_queries(_: None, mine: Any) -> tuple[None, tuple[Array, Array]]:
        (q, queries), may_see = mine
        q_BxKxMxH = _rows(q)

        def with_keys(n: Array, carry: Any) -> Any:
            most, total, out = carry
            k, v, keys = _chunk(k_chunks, n)
            is_seen = _each(seen(queries, keys, window), G)
            scores = jnp.where(is_seen, level_off(_product("bkmh,bkdh->bkmd", q_BxKxMxH, k) * scale, cap), _NONE)
            more = jnp.maximum(most, scores.max(-1))
            weights = jnp.where(is_seen, jnp.exp(scores - more[..., None]), 0)
            kept = jnp.exp(most - more)
            part = _product("bkmd,bkdh->bkmh", weights.astype(q.dtype), v)
            return more, total * kept + weights.sum(-1), out * kept[..., None] + part

        start = jnp.full(q_BxKxMxH.shape[:3], _NONE), jnp.zeros(q_BxKxMxH.shape[:3]), jnp.zeros(q_BxKxMxH.shape)
        most, total, out = _over(may_see, with_keys, start)
        safe = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        normaliser = (most + jnp.log(safe)).reshape(*most.shape[:2], G, -1)
        return None, (_tokens((out / safe[..., None]).astype(q.dtype), G), normaliser)

    _, (out, normaliser) = lax.scan(of_queries, None, (q_chunks, _may_see(q_chunks[1], k_chunks[2], window)))
    return _joined(out, q.shape[1], 1), _joined(normaliser, q.shape[1], 3)


def _with_residuals(
    q: Array, k: Array, v: Array, queries: Places, keys: Places, window: Any, *options: Any
) -> tuple[Array, Any]:
    out, normaliser = _forward(q, k, v, queries, keys, window, *options)
    return out, (q, k, v, queries, keys, window, out, normaliser)


def _backward(scale: float, cap: float | None, chunk: int, kept: Any, dout: Array) -> Any:
    q, k, v, queries, keys, window, out, normaliser = kept
    delta = jnp.einsum("btkgh,btkgh->bkgt", dout, out, preferred_element_type=jnp.float32)
    q_chunks = _cut((q, dout, queries), chunk), _cut((normaliser, delta), chunk, axis=3)
    k_chunks, G = _by_head(_cut((k, v, keys), chunk)), q.shape[3]

    def of_queries(sums: Any, mine: Any) -> tuple[Any, Array]:
        ((q, dout, queries), of_rows), may_see = mine
        q, dout = _rows(q), _rows(dout)
        normaliser, delta = (array.reshape(*q.shape[:3], 1) for array in of_rows)

        def with_keys(n: Array, carry: Any) -> Any:
            dq, sums = carry
            k, v, keys = _chunk(k_chunks, n)
            scores = level_off(_product("bkmh,bkdh->bkmd", q, k) * scale, cap)
            weights = jnp.where(_each(seen(queries, keys, window), G), jnp.exp(scores - normaliser), 0)
            dv = _product("bkmd,bkmh->bkdh", weights.astype(q.dtype), dout)
            dscores = weights * (_product("bkmh,bkdh->bkmd", dout, v) - delta)
            if cap is not None:
                dscores = dscores * (1 - (scores / cap) ** 2)
            dscores = (dscores * scale).astype(q.dtype)
            dk = _product("bkmd,bkmh->bkdh", dscores, q)
            sums = jax.tree.map(lambda sums, more: sums.at[n].add(more), sums, (dk, dv))
            return dq + _product("bkmd,bkdh->bkmh", dscores, k), sums

        dq, sums = _over(may_see, with_keys, (jnp.zeros(q.shape, jnp.float32), sums))
        return sums, _tokens(dq.astype(q.dtype), G)

    start = jax.tree.map(lambda chunks: jnp.zeros(chunks.shape, jnp.float32), k_chunks[:2])
    sums, dq = lax.scan(of_queries, start, (q_chunks, _may_see(q_chunks[0][2], k_chunks[2], window)))
    dk, dv = (
        _joined(jnp.swapaxes(of_all, 2, 3), k.shape[1], 1).astype(of.dtype)
        for of_all, of in zip(sums, (k, v), strict=True)
    )
    return _joined(dq, q.shape[1], 1), dk, dv, *jax.tree.map(_no_tangent, (queries, keys, window))


chunked.defvjp(_with_residuals, _backward)


# Within the loops a head's rows are one after the other, those of its G queries too (M of them: G times C), so that
# each product is one of matrices as they lie; of other layouts each turn would turn its arrays around.
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rows(q_BxCxKxGxH: Array) -> Array:
    """Return (B, K, M, H)."""
    B, C, K, G, H = q_BxCxKxGxH.shape
    return jnp.transpose(q_BxCxKxGxH, (0, 2, 3, 1, 4)).reshape(B, K, G * C, H)


def _tokens(rows_BxKxMxH: Array, G: int) -> Array:
    """Return (B, C, K, G, H), as `_rows` had it."""
    B, K, M, H = rows_BxKxMxH.shape
    return jnp.transpose(rows_BxKxMxH.reshape(B, K, G, M // G, H), (0, 3, 1, 2, 4))


def _by_head(chunks: tuple[Array, Array, Places]) -> tuple[Array, Array, Places]:
    """Return chunks of keys and values (n, B, D, K, H) as (n, B, K, D, H)."""
    k, v, keys = chunks
    return jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3), keys


def _each(seen_BxCxD: Array, G: int) -> Array:
    """Return which keys the rows of each head see, (B, 1, M, D)."""
    return jnp.tile(seen_BxCxD, (1, G, 1))[:, None]


def _no_tangent(integers: Array) -> np.ndarray:
    return np.zeros(integers.shape, jax.dtypes.float0)


def _over(may_see: Array, act: Callable[[Array, Any], Any], start: Any) -> Any:
    """Go over the chunks of keys of which some may be seen: `carry = act(n, carry)`.

    A loop of one turn or none is a choice that holds nothing for a backward pass: from a `cond` in a scan a remat whose
    policy keeps products would keep all scores.
    """

    def step(carry: Any, this: Any) -> tuple[Any, None]:
        n, is_wanted = this

        def turn(state: Any) -> Any:
            return jnp.zeros_like(is_wanted), act(n, state[1])

        return lax.while_loop(lambda state: state[0], turn, (is_wanted, carry))[1], None

    return lax.scan(step, start, (jnp.arange(may_see.shape[0]), may_see))[0]


def _may_see(queries: Places, keys: Places, window: Any) -> Array:
    """Say which chunks of queries may see which of keys, bool (chunks, chunks), by the bounds of places (n, B, chunk).

    It is found before the loops, as rows that lie on several devices have to agree.
    """
    # A query of padding sees nothing, and a key of padding is not seen: neither is a bound.
    is_query, is_key = queries.positions >= 0, keys.positions >= 0
    far = jnp.iinfo(jnp.int32).max // 2
    latest = queries.positions.max(-1)
    found = jnp.where(is_key, keys.positions, far).min(-1)[None] <= latest[:, None]
    if window is not None:
        earliest = jnp.where(is_query, queries.positions, far).min(-1)
        found &= keys.positions.max(-1)[None] > earliest[:, None] - window
    if queries.segments is not None and keys.segments is not None:
        found &= keys.segments.min(-1)[None] <= queries.segments.max(-1)[:, None]
        found &= keys.segments.max(-1)[None] >= queries.segments.min(-1)[:, None]
    return found.any(-1)


def _chunk(chunks: Any, n: Array) -> Any:
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, n, 0, keepdims=False), chunks)


def _cut(tree: Any, chunk: int, axis: int = 1) -> Any:
    """Return arrays cut along an axis, (chunks, ..., chunk, ...), the last filled up; places there are padding."""

    def cut(array: Array) -> Array:
        n = array.shape[axis]
        size = min(chunk, n)
        integers = jnp.issubdtype(array.dtype, jnp.integer)
        padding = [(0, -n % size * (at == axis)) for at in range(array.ndim)]
        full = jnp.pad(array, padding, constant_values=-1 if integers else 0)
        return jnp.moveaxis(full.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(cut, tree)


def _joined(chunks: Array, length: int, axis: int) -> Array:
    """Return what `_cut` cut, without what it added."""
    array = jnp.moveaxis(chunks, 0, axis)
    array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return lax.slice_in_dim(array, 0, length, axis=axis)
