"""Attention by positions: grouped heads, and the cache of keys and values.

Shapes in names are those of `rslora_jax.models.decoder`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from rslora_jax.models.chunked import chunked
from rslora_jax.models.decoder_config import LARGEST_SIZE
from rslora_jax.models.kernels import KERNELS, attend_by, best, cannot
from rslora_jax.models.places import Places, scores_of, seen

if TYPE_CHECKING:
    from rslora_jax.models.decoder_config import DecoderConfig

Array = jax.Array
Cache = dict[str, Array]
Block = tuple[Array, Array, Places]  # keys, values, where they stand

_NONE = -1e30  # the score of a key that is not seen
_FEW = 64  # queries up to which all their scores are held, as of a token in generation

# Where the rows lie in a cache, as `rslora_jax.per_example` and `jax.vmap` ask.
CACHE_ROWS = {"k": 1, "v": 1, "positions": 0, "index": None}


def attend(
    q_BxTxNxH: Array,
    queries: Places,
    blocks: Sequence[Block],
    window: int | None = None,
    *,
    windowed: Array | None = None,
    size: float | None = None,
    cap: float | None = None,
    how: str = "auto",
) -> Array:
    """Attend to several blocks of keys as if they were one.

    Args:
      q_BxTxNxH: the queries.
      queries: where they stand.
      blocks: keys_BxSxKxH, values_BxSxKxH and where they stand, of each, with N a multiple of K. They stay apart, as
        joining a cache with the new keys would copy the cache at every token.
      window: among how many positions that end with its own a query sees keys; None for all.
      windowed: a scalar bool that says whether there is the window, where layers of one program differ in it.
      size: scores are divided by its root, by default that of H.
      cap: scores become cap * tanh(scores / cap).
      how: a name of `decoder_config.ATTENTION`: "xla", all scores at once; "chunked", some at a time; a kernel; or
        "auto", what is best for shape, dtype and platform. What a kernel cannot do is done in chunks, with a warning
        if it was named, and a few queries, as in generation, with all their scores.

    Returns:
      (B, T, N, H) in the queries' dtype; scores and softmax are float32. A query that sees no key gets zeros.

    >>> q, kv, at = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8)), Places(jnp.arange(2)[None])
    >>> attend(q, at, [(kv, kv, at), (kv, kv, at)]).shape
    (1, 2, 4, 8)
    """
    B, T, N, H = q_BxTxNxH.shape
    blocks = [block for block in blocks if block[0].shape[1]] or blocks  # a cache may have no slots yet
    K, S = blocks[0][0].shape[2], sum(k.shape[1] for k, _, _ in blocks)
    scale, form = (size or H) ** -0.5, form_of(how, q_BxTxNxH, S, queries, blocks, windowed is not None, cap)
    if form in KERNELS:
        return attend_by(form, q_BxTxNxH, *blocks[0][:2], queries, window, windowed, scale, cap)
    limit = window if windowed is None or window is None else jnp.where(windowed, window, LARGEST_SIZE // 2)
    q_BxTxKxGxH = q_BxTxNxH.reshape(B, T, K, N // K, H)
    if form == "chunked":
        k_BxSxKxH, v_BxSxKxH, keys = blocks[0] if len(blocks) == 1 else _joined(blocks)
        limit = None if limit is None else jnp.asarray(limit, jnp.int32)
        # Places are the same in all layers, and JAX would take what depends on them alone, who sees whom, out of a scan
        # over these, and keep it. So they are made to depend on the queries.
        q_BxTxKxGxH, queries, keys, limit = lax.optimization_barrier((q_BxTxKxGxH, queries, keys, limit))
        # Large enough that its products are, and small enough that on CPUs its scores stay near (`attention_cost.py`).
        chunk = 128 if S <= 1024 else max(256, 512 * K // N)
        out = chunked(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, queries, keys, limit, scale, cap, chunk)
    else:
        out = _whole(q_BxTxKxGxH, queries, blocks, limit, scale, cap)
    return out.reshape(B, T, N, H)


def form_of(
    how: str, q_BxTxNxH: Array, keys: int, queries: Places, blocks: Sequence[Block], by_layer: bool, cap: float | None
) -> str:
    """Return in which form to attend: the one that is named, where it can and is for so many tokens."""
    if how in ("xla", "chunked"):
        return how
    is_same = len(blocks) == 1 and blocks[0][2].positions is queries.positions
    T, kernel = q_BxTxNxH.shape[1], best() if how == "auto" else how
    reason = cannot(kernel, q_BxTxNxH, is_same, by_layer or not queries.is_plain, cap) if kernel else None
    if kernel and not reason and T > _FEW:
        return kernel
    if how != "auto" and T > _FEW:
        warnings.warn(f"attention {how!r} {reason}: it is done in chunks", stacklevel=3)
        return "chunked"
    # On CPUs chunks are better from 256 queries and keys (`scripts/attention_cost.py`). Elsewhere a chunk is too little
    # work up to some thousand, and beyond that the scores of all are too much memory.
    least = 256**2 if jax.default_backend() == "cpu" else 2048**2
    return "chunked" if least <= T * keys and T > _FEW else "xla"


def _joined(blocks: Sequence[Block]) -> Block:
    k, v, places = zip(*blocks, strict=True)
    return jnp.concatenate(k, 1), jnp.concatenate(v, 1), Places(jnp.concatenate([at.positions for at in places], 1))


def _whole(
    q_BxTxKxGxH: Array, queries: Places, blocks: Sequence[Block], window: Any, scale: float, cap: float | None
) -> Array:
    """Attend with the scores of all queries and keys."""
    # A finite floor and not -inf: padding rows see no key at all, and -inf would make them (and, through
    # the backward pass, everything) NaN.
    scores_BxKxGxTxS = jnp.concatenate(
        [
            jnp.where(seen(queries, places, window)[:, None, None], scores_of(q_BxTxKxGxH, k, scale, cap), _NONE)
            for k, _, places in blocks
        ],
        axis=-1,
    )
    weights_BxKxGxTxS = jax.nn.softmax(scores_BxKxGxTxS, axis=-1).astype(q_BxTxKxGxH.dtype)
    sees_any_BxTxKxGx1 = jnp.moveaxis(scores_BxKxGxTxS.max(-1) > _NONE, -1, 1)[..., None]
    out_BxTxKxGxH = jnp.zeros((), jnp.float32)
    start = 0
    for k, v_BxSxKxH, _ in blocks:
        part = lax.slice_in_dim(weights_BxKxGxTxS, start, start + k.shape[1], axis=-1)
        out_BxTxKxGxH += jnp.einsum("bkgts,bskh->btkgh", part, v_BxSxKxH, preferred_element_type=jnp.float32)
        start += k.shape[1]
    return jnp.where(sees_any_BxTxKxGx1, out_BxTxKxGxH, 0).astype(q_BxTxKxGxH.dtype)


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
