"""Attention by positions: grouped heads, and the cache of keys and values.

Shapes in names are those of `rslora_jax.models.decoder`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from rslora_jax.models.decoder_config import DecoderConfig

Array = jax.Array
Cache = dict[str, Array]

# Where the rows lie in a cache, as `rslora_jax.per_example` and `jax.vmap` ask.
CACHE_ROWS = {"k": 1, "v": 1, "positions": 0, "index": None}


def attend(
    q_BxTxNxH: Array, blocks: list[tuple[Array, Array, Array]], size: float | None = None, cap: float | None = None
) -> Array:
    """Attend to several blocks of keys as if they were one.

    `blocks` holds (keys_BxSxKxH, values_BxSxKxH, mask_BxTxS), with N a multiple of K. Returns (B, T, N, H) in
    the queries' dtype; scores and softmax are float32. A query whose mask is empty gets a finite average.
    Scores are divided by the root of `size` (H), and with a `cap` become cap * tanh(scores / cap).

    Blocks stay apart because joining a cache with the new keys would copy the cache at every token.

    >>> q, kv, mask = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2), bool)
    >>> attend(q, [(kv, kv, mask), (kv, kv, mask)]).shape
    (1, 2, 4, 8)
    """
    B, T, N, H = q_BxTxNxH.shape
    K = blocks[0][0].shape[2]
    q_BxTxKxGxH = q_BxTxNxH.reshape(B, T, K, N // K, H)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    # A finite floor and not -inf: padding rows see no key at all, and -inf would make them (and, through
    # the backward pass, everything) NaN.
    scores = [einsum("btkgh,bskh->bkgts", q_BxTxKxGxH, k) * (size or H) ** -0.5 for k, _, _ in blocks]
    scores = [
        jnp.where(mask[:, None, None], level_off(block, cap), -1e30)
        for block, (_, _, mask) in zip(scores, blocks, strict=True)
    ]
    weights_BxKxGxTxS = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BxTxNxH.dtype)
    out_BxTxKxGxH = jnp.zeros((), jnp.float32)
    start = 0
    for _, v_BxSxKxH, mask in blocks:
        part = lax.slice_in_dim(weights_BxKxGxTxS, start, start + mask.shape[-1], axis=-1)
        out_BxTxKxGxH += einsum("bkgts,bskh->btkgh", part, v_BxSxKxH)
        start += mask.shape[-1]
    return out_BxTxKxGxH.reshape(B, T, N, H).astype(q_BxTxNxH.dtype)


def level_off(x: Array, cap: float | None) -> Array:
    """Give cap * tanh(x / cap), of which no entry is beyond the cap; x where there is none.

    >>> [round(float(x), 3) for x in level_off(jnp.array([0.01, 1000.0]), 5.0)]
    [0.01, 5.0]
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible(query_positions_BxT: Array, key_positions_BxS: Array) -> Array:
    """Say which keys each query may see, bool (B, T, S): those at a position neither negative nor later.

    >>> visible(jnp.array([[0, 1]]), jnp.array([[-1, 0, 1]])).tolist()
    [[[False, True, False], [False, True, True]]]
    """
    keys_Bx1xS = key_positions_BxS[:, None, :]
    return (keys_Bx1xS >= 0) & (keys_Bx1xS <= query_positions_BxT[:, :, None])


def within(query_positions_BxT: Array, key_positions_BxS: Array, window: int) -> Array:
    """Say which keys lie among the `window` positions that end with each query's, bool (B, T, S), or after it.

    >>> within(jnp.array([[0, 3]]), jnp.array([[0, 1, 2, 3]]), window=2).tolist()
    [[[True, True, True, True], [False, False, True, True]]]
    """
    return key_positions_BxS[:, None, :] > query_positions_BxT[:, :, None] - window


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
    """Give an empty cache of `length` slots for `batch` rows.

    A plain dict: "k" and "v" of shape (L, B, S, K, H) in `dtype` (default `config.dtype`), "positions" (B, S)
    int32 with -1 for an empty slot, "index" () int32, the next slot to write.

    Raises:
      ValueError: `length` is above `config.max_len`.

    >>> from rslora_jax.models.decoder import DecoderConfig
    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> {name: leaf.shape for name, leaf in init_cache(config, batch=3, length=8).items()}
    {'k': (2, 3, 8, 2, 4), 'v': (2, 3, 8, 2, 4), 'positions': (3, 8), 'index': ()}
    """
    if length > config.max_len:
        raise ValueError(f"a cache of {length} slots is longer than max_len={config.max_len}: ask for fewer")
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {
        "k": jnp.zeros(shape, dtype or config.dtype),
        "v": jnp.zeros(shape, dtype or config.dtype),
        "positions": jnp.full((batch, length), -1, jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def extend(cache: Cache, new: dict[str, Array], positions_BxT: Array) -> Cache:
    """Write the keys and values of T tokens, each (L, B, T, K, H), into the next T slots of a cache.

    The caller keeps within the cache's end: past it the write would slide back over older slots. A cache of no
    slots becomes one of T.

    >>> from rslora_jax.models.decoder import DecoderConfig
    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> new = jnp.ones((2, 1, 3, 2, 4))
    >>> cache = extend(init_cache(config, 1, 5), {"k": new, "v": new}, jnp.array([[-1, 0, 1]]))
    >>> cache["positions"].tolist(), int(cache["index"])
    ([[-1, 0, 1, -1, -1]], 3)
    """
    if not cache["positions"].shape[1]:
        kept = {name: new[name].astype(cache[name].dtype) for name in ("k", "v")}
        return {**kept, "positions": positions_BxT.astype(jnp.int32), "index": jnp.int32(positions_BxT.shape[1])}
    write = partial(lax.dynamic_update_slice_in_dim, start_index=cache["index"])
    return {
        "k": write(cache["k"], new["k"].astype(cache["k"].dtype), axis=2),
        "v": write(cache["v"], new["v"].astype(cache["v"].dtype), axis=2),
        "positions": write(cache["positions"], positions_BxT.astype(jnp.int32), axis=1),
        "index": cache["index"] + positions_BxT.shape[1],
    }


def lengthen(cache: Cache, slots: int) -> Cache:
    """Give a cache with so many more empty slots.

    >>> from rslora_jax.models.decoder import DecoderConfig
    >>> config = DecoderConfig(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> longer = lengthen(init_cache(config, batch=1, length=2), 3)
    >>> longer["k"].shape, longer["positions"].tolist()
    ((2, 1, 5, 2, 4), [[-1, -1, -1, -1, -1]])
    """

    def more(leaf: Array, axis: int, empty: int) -> Array:
        return jnp.pad(leaf, [(0, slots * (n == axis)) for n in range(leaf.ndim)], constant_values=empty)

    wide = {"k": more(cache["k"], 2, 0), "v": more(cache["v"], 2, 0)}
    return {**wide, "positions": more(cache["positions"], 1, -1), "index": cache["index"]}
