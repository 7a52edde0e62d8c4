"""Attention by kernels that others maintain: splash attention, which JAX has for TPUs, cuDNN's, and those of tokamax.

They take causality from the order of a row, and not from positions. So rows are to be in order, which no shape shows:
where they are not, the result is NaN. What a kernel cannot do is said by `cannot`, before anything is computed.

Shapes in names are those of `rslora_jax.models.decoder`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.backend import get_default_device
from jax.sharding import AxisType, PartitionSpec

from rslora_jax.models.places import Places, seen
from rslora_jax.parallel.sharding import BATCH_AXES
from rslora_jax.stored.laid import dividing

KERNELS = ("cudnn", "pallas")

# A mask is an array of T x S: little beside the scores of all heads, and too much for what is said to grow with T.
MOST_MASKED = 4096

_PADDING = jnp.iinfo(jnp.int32).min  # the segment of padding: of the kernels' own, which have no positions
_LANES = 128  # tokens of a row come to a kernel of a TPU in blocks of so many or a multiple


def best() -> str | None:
    """Return the kernel that is for the platform of the default device, None where there is none.

    No compiler can split a kernel. So where there are several devices, a mesh in context has to say how they share the
    rows, or `jax.default_device` that the program is for one.
    """
    device, is_one = get_default_device(), jax.config.jax_default_device is not None  # type: ignore[attr-defined]
    if jax.device_count() > 1 and not is_one and jax.sharding.get_abstract_mesh().empty:
        return None
    if device.platform == "tpu":
        return "pallas"
    return "cudnn" if "NVIDIA" in device.device_kind else None


def not_here(how: str) -> str | None:
    """Say why a kernel does not run on the default device, in words that follow its name; None where it does."""
    device = get_default_device()
    if how == "cudnn":
        return None if "NVIDIA" in device.device_kind else f"is for NVIDIA GPUs, and this is a {device.device_kind}"
    return None if device.platform in ("tpu", "gpu") else f"is for TPUs and GPUs, and this is a {device.device_kind}"


def cannot(how: str, q_BxTxNxH: Array, is_same: bool, needs_mask: bool, cap: float | None) -> str | None:
    """Say why a kernel cannot attend so, in words that follow its name; None where it can.

    Args:
      how: one of `KERNELS`.
      q_BxTxNxH: an array or its shape.
      is_same: queries and keys are the same tokens.
      needs_mask: who sees whom is more than causality and one window of all layers.
      cap: as for `attend`.
    """
    T, size = q_BxTxNxH.shape[1], q_BxTxNxH.shape[-1]
    if not is_same:
        return "takes queries and keys of the same tokens, without a cache"
    if how == "pallas" and not _is_gpu():
        return None
    if needs_mask and T > MOST_MASKED:
        return (
            f"needs a mask of all tokens with all for such rows, which is for at most {MOST_MASKED}, and there are {T}"
        )
    if how == "pallas":
        return None if importlib.util.find_spec("tokamax") else "is of tokamax on GPUs, which is not installed"
    if q_BxTxNxH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q_BxTxNxH.dtype}"
    if size > _LANES or size % 8:
        return f"takes heads of at most {_LANES}, in steps of 8, not of {size}"
    return None if cap is None else "has no cap of scores"


def attend_by(
    how: str,
    q_BxTxNxH: Array,
    k_BxTxKxH: Array,
    v_BxTxKxH: Array,
    at: Places,
    window: int | None,
    windowed: Array | None,
    scale: float,
    cap: float | None,
) -> Array:
    """Attend by a kernel that can; arguments as of `attend`, (B, T, N, H) in the queries' dtype."""

    def local(q: Array, k: Array, v: Array, at: Places, windowed: Array | None) -> Array:
        if how == "cudnn" or _is_gpu():
            limit = window if windowed is None or window is None else jnp.where(windowed, window, q.shape[1])
            out = _masked(how, q, k, v, at, limit, scale, cap)
        elif windowed is None or window is None:
            out = _splash(q, k, v, at, window, scale, cap)
        else:  # a kernel is made for one window
            by_window = [functools.partial(_splash, window=limit, scale=scale, cap=cap) for limit in (None, window)]
            out = lax.switch(windowed.astype(jnp.int32), by_window, q, k, v, at)
        if at.is_plain:
            return out
        out = jnp.where((at.positions >= 0)[..., None, None], out, 0)
        return jnp.where(in_order(at, window)[:, None, None, None], out, jnp.nan)

    arguments = q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, at, windowed
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if not free:
        return local(*arguments)
    # No compiler can split a kernel: each device has its rows and heads.
    rows = dividing(mesh, q_BxTxNxH.shape[0], [name for name in BATCH_AXES if name in free])
    heads = dividing(mesh, k_BxTxKxH.shape[2], ["tensor"] if "tensor" in free else None)
    of_arrays, of_places = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    specs = (of_arrays, of_arrays, of_arrays, of_places, PartitionSpec())
    return jax.shard_map(local, in_specs=specs, out_specs=of_arrays, axis_names=free, check_vma=False)(*arguments)


def in_order(at: Places, window: int | None) -> Array:
    """Say for each row whether the order of its tokens is that of their positions, bool (B,).

    Padding may be on either side. Segments follow one another in a rising order of their numbers, positions rise within
    each, and with a window by 1.

    >>> segments = jnp.array([[0, 1, 1], [3, 4, 4], [1, 1, 1]])
    >>> in_order(Places(jnp.array([[-1, 0, 1], [0, 0, 1], [1, 0, -1]]), segments), window=2).tolist()
    [True, True, False]
    """
    is_token = at.positions >= 0
    segments = jnp.zeros_like(at.positions) if at.segments is None else at.segments
    joined = is_token[:, :-1] & is_token[:, 1:] & (segments[:, :-1] == segments[:, 1:])
    step = at.positions[:, 1:] - at.positions[:, :-1]
    rises = (step == 1) if window is not None else (step > 0)
    # What begins after padding or after another segment has to have a number above all before it.
    before = lax.cummax(jnp.where(is_token, segments, _PADDING), axis=1)[:, :-1]
    is_new = is_token[:, 1:] & ((segments[:, 1:] > before) | (before == _PADDING))
    return jnp.all(~is_token[:, 1:] | jnp.where(joined, rises, is_new), axis=1)


def _is_gpu() -> bool:
    return get_default_device().platform == "gpu"


def _splash(q: Array, k: Array, v: Array, at: Places, window: int | None, scale: float, cap: float | None) -> Array:
    """Attend by splash attention, `jax.experimental.pallas.ops.tpu`: a block of queries and of keys at a time."""
    T = q.shape[1]
    padded = -(-T // _LANES) * _LANES  # behind the row, where causality hides it
    segments = jnp.where(at.positions >= 0, 0 if at.segments is None else at.segments, _PADDING)
    ids = jnp.pad(segments, ((0, 0), (0, padded - T)), constant_values=_PADDING)

    def laid(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))), 2, 1)

    kernel = splash_kernel(q.shape[2], padded, window, cap)
    q = (q * jnp.asarray(scale, jnp.float32)).astype(q.dtype)
    rows = laid(q), laid(k), laid(v), None if at.is_plain else ids
    out_BxNxTxH = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, _segment_ids(ids)))(*rows)
    return jnp.moveaxis(out_BxNxTxH, 1, 2)[:, :T]


def _segment_ids(ids_T: Array | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return None if ids_T is None else splash_attention_kernel.SegmentIds(ids_T, ids_T)


def splash_kernel(
    heads: int, tokens: int, window: int | None, cap: float | None, interpret: bool = False
) -> Callable[..., Array]:
    """Make the kernel for one row of so many heads and tokens."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = next(size for size in (512, 256, _LANES) if tokens % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": size for name in names}
    shape = (tokens, tokens)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    more: dict[str, Any] = dict(
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    return splash.make_splash_mha(masks.MultiHeadMask([one] * heads), **more)


def _masked(how: str, q: Array, k: Array, v: Array, at: Places, window: Any, scale: float, cap: float | None) -> Array:
    """Attend by cuDNN through JAX, or by tokamax: with a mask of all tokens with all, or without one."""
    more: dict[str, Any] = dict(scale=scale, is_causal=True)
    if at.is_plain and isinstance(window, int | None):
        more |= {} if window is None else {"local_window_size": (window - 1, 0)}
    else:
        more |= {"mask": mask_of(at, window)}
    if how == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, **more, implementation="cudnn")
    return by_tokamax(q, k, v, cap, **more)


def mask_of(at: Places, window: Any) -> Array:
    """Say who sees whom, (B, 1, T, T). Padding sees itself: some kernels give NaN for a softmax of nothing."""
    mask = seen(at, at, window)
    return (mask | jnp.eye(mask.shape[-1], dtype=bool))[:, None]


def by_tokamax(q: Array, k: Array, v: Array, cap: float | None, by: Any = ("mosaic", "triton"), **more: Any) -> Array:
    """Attend by tokamax, by the first of its implementations that can; `more` as it has them."""
    import tokamax

    return tokamax.dot_product_attention(q, k, v, logits_soft_cap=cap, implementation=by, **more)
