"""A start of one matrix, taken over all of a model's weights: one after the other, and of a stack layer by layer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from rslora_jax.adapters import Adapters
from rslora_jax.methods.lora import METHOD as PLAIN
from rslora_jax.methods.method import RANK, asked, masked
from rslora_jax.methods.random import site_key
from rslora_jax.parallel.sharding import adapter_shardings
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site, from_paths, named_leaves
from rslora_jax.stored.form import Stored, dense, is_stored
from rslora_jax.transform.views import wide
from rslora_jax.wrap import Lora

# What a start does with one matrix (in, out) or, of a start that does not look at it, with None:
# `find(site, w_IxO, key, *options)` gives (first_IxR, second_RxO). The site is that of this matrix alone.
Find = Callable[..., tuple[Array, Array]]
Progress = Callable[[int, int], Any]


def unseen(done: int, total: int) -> None:
    """Show no progress."""


def found(
    lora: Lora,
    params: Params,
    key: Array,
    find: Find,
    options: tuple[Any, ...] = (),
    *,
    reads: bool = True,
    progress: Progress = unseen,
) -> Adapters:
    """Return the adapters of a start.

    Args:
      lora: from `wrap`.
      params: the base.
      key: a PRNG key; every matrix draws from one of its own.
      find: what the start does with one matrix, a function of a module; compiled once for each shape.
      options: what `find` takes beside, hashable.
      reads: whether it looks at the matrix.
      progress: told the number of matrices done and their number in all.
    """
    adapters, leaves = lora.init(key, params), named_leaves(params)
    shardings, seen = on_mesh(lora, params), counted(started(lora), progress)
    for path, site in started(lora).items():
        w = leaves[site.weight] if reads else None
        adapters[path] = found_of(site, adapters[path], w, key, find, options, shardings.get(path, {}), seen)
    return adapters


def counted(sites: Mapping[str, Site], progress: Progress, times: int = 1) -> Callable[[], None]:
    """Return what is to be called for each matrix that is done; it tells how many are, and their number in all."""
    total, done = times * sum(1 for site in sites.values() for _ in _elements(site)), itertools.count(1)
    return lambda: progress(next(done), total)


def found_of(
    site: Site,
    adapter: Mapping[str, Array],
    w: Any,
    key: Array,
    find: Find,
    options: tuple[Any, ...],
    where: Mapping[str, Any],
    seen: Callable[[], Any],
    minus: Stored | None = None,
) -> dict[str, Array]:
    """Return the adapter of a start for one weight.

    Args:
      site: its site.
      adapter: the adapter as `init` has it.
      w: the weight; None, of a start that does not look at it.
      key, find, options: as of `found`.
      where: where the adapter's arrays are to lie, by name; nothing, where that does not matter.
      seen: called for each matrix that is done.
      minus: what is taken off the weight before it is looked at.
    """
    own = {n: jnp.zeros(x.shape, x.dtype, device=where.get(n)) for n, x in _having_rank(site, adapter)}
    for index, one in _elements(site):
        at = jax.random.fold_in(site_key(key, site.path), _number(site, index))
        own = _filled(find, one, options, own, w, minus, np.asarray(index, np.int32), at)
        jax.block_until_ready(own)
        seen()
    placed = {name: jax.device_put(array, where[name]) if where else array for name, array in own.items()}
    return {**adapter, **placed}


def changed(lora: Lora, params: Params, start: Adapters) -> Params:
    """Return the base of which adapters at their start make the one given: W - gamma A B in place of each W.

    Args:
      lora: from `wrap`.
      params: the base.
      start: the adapters, as a start that changes the base gives them.

    Returns:
      A pytree of the structure, dtypes and shardings of `params`; what is not adapted is the same arrays.

    Raises:
      ValueError: a weight cannot be changed.
    """
    check_changes(lora, params)
    lora.check(params, start)
    leaves = named_leaves(params)
    for path, site in started(lora).items():
        leaves[site.weight] = changed_of(site, leaves[site.weight], start[path])
    return from_paths(params, leaves)


def changed_of(site: Site, given: Array, start: Mapping[str, Array]) -> Array:
    """Return one weight less the update of its adapter at the start."""
    w = jnp.copy(given)  # a layer at a time is changed in its place
    own = dict(_having_rank(site, start))
    for index, one in _elements(site):
        w = _less(one, w, own, np.asarray(index, np.int32))
    where = getattr(given, "sharding", None)
    return jax.device_put(w, where) if isinstance(where, NamedSharding) else w


def started(lora: Lora) -> dict[str, Site]:
    """Return the sites that a start is for: what has no rank, as a value that is trained whole, is as `init` has it."""
    return {path: site for path, site in lora.sites.items() if site.scaled}


def check_method(lora: Lora) -> None:
    """Raise a ValueError where the adapters have no factors that a start could place."""
    for site in started(lora).values():
        asked(site.method, "less", f"have another start ({site.path})")


def check_changes(lora: Lora, params: Params) -> None:
    """Raise a ValueError that names the first weight that a start cannot change."""
    check_method(lora)
    leaves = named_leaves(params)
    for path, site in started(lora).items():
        if is_stored(leaves[site.weight]):
            raise ValueError(
                f"{path} is stored as {leaves[site.weight].format}, and this start changes the weight: give the "
                "weights as arrays, to `starts.loftq` or to this start with `quantize` after it, or take a start that "
                "leaves the base as it is, orthogonal or eva"
            )
        if site.use:
            raise ValueError(
                f"{path} adapts one use of its weight, and this start would change it for the other use too: adapt "
                "the whole weight, or take a start that leaves the base as it is, orthogonal or eva"
            )
        full = min(site.in_size, site.out_size)
        if site.rank > full:
            raise ValueError(
                f"{path} has rank {site.rank}, and its weight no more than {full} directions to start from: lower it"
            )


def _elements(site: Site) -> Iterator[tuple[tuple[int, ...], Site]]:
    """Give the places on a weight's stack that have an adapter, and the site of each: (), of one that is not stacked.

    Of these sites the stack's axes are of size 1. They are alike for equal shapes, ranks and scales.
    """
    shape = tuple(1 if axis in site.stack_axes else n for axis, n in enumerate(site.shape))
    one = dataclasses.replace(site, path="w", shape=shape, fallbacks=(), use="", uses=(), layers=())
    axis = site.stack_axes.index(site.layer_axis) if site.layers else 0  # type: ignore[arg-type]
    for index in itertools.product(*map(range, site.sizes(site.stack_axes))):
        own = dataclasses.replace(one, **site.layers[index[axis]]._asdict()) if site.layers else one
        if own.rank:
            yield index, own


def _as_matrix(site: Site, w: Array) -> Array:
    """Return a weight as matrices, (*stack, in, out), in float32 at least."""
    moved = jnp.transpose(w, (*site.stack_axes, *site.in_axes, *site.out_axes))
    return moved.reshape(*site.sizes(site.stack_axes), site.in_size, site.out_size).astype(wide(w.dtype))


def exactly(act: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function be traced with products of full precision: a GPU's own would leave three digits."""

    @functools.wraps(act)
    def precise(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return act(*args)

    return precise


def placed_as(
    site: Site, like: Mapping[str, Array], first: Array, second: Array, where: Mapping[str, Any]
) -> dict[str, Array]:
    """Return two matrices, or stacks of them, as a site's factors, of the dtypes of `like`.

    `where` says for each name where it is to lie; nothing, where that does not matter.
    """
    placed = masked(site, PLAIN.of_low_rank(site, first, second))
    cast = {name: array.astype(like[name].dtype) for name, array in placed.items()}
    return {name: jax.device_put(array, where[name]) if where else array for name, array in cast.items()}


def on_mesh(lora: Lora, params: Params) -> dict[str, dict[str, Any]]:
    """Return where the adapters lie of the weights that lie on a mesh."""
    leaves = named_leaves(params)
    parts = {path: jax.tree.leaves(leaves[site.weight])[0] for path, site in started(lora).items()}
    on = {path for path, part in parts.items() if isinstance(getattr(part, "sharding", None), NamedSharding)}
    return adapter_shardings({path: site for path, site in lora.sites.items() if path in on}, params)  # type: ignore[return-value]


def _number(site: Site, index: Sequence[int]) -> int:
    """Return the number of a place on the stack."""
    sizes = site.sizes(site.stack_axes)
    return sum(n * math.prod(sizes[axis + 1 :]) for axis, n in enumerate(index))


def _having_rank(site: Site, arrays: Mapping[str, Array]) -> list[tuple[str, Array]]:
    """Return the arrays that have the rank, by name."""
    return [(name, arrays[name]) for name, axes in site.factors.items() if RANK in axes]


def _cut(site: Site, w: Array, index: Array) -> Array:
    """Return one element of a stack, with its axes of size 1."""
    for n, axis in enumerate(site.stack_axes):
        w = lax.dynamic_slice_in_dim(w, index[n], 1, axis)
    return w


def _cut_dense(site: Site, w: Stored, index: Array) -> Array:
    """Return one element of a stack as an array; only what is taken is made dense where the stack is in front."""
    ahead = sum(n == axis for n, axis in enumerate(site.stack_axes[: len(w.stack)]))
    for n in range(ahead):
        w = jax.tree.map(lambda part, n=n: lax.dynamic_slice_in_dim(part, index[n], 1, n), w)
    whole = w.dense()
    for n, axis in list(enumerate(site.stack_axes))[ahead:]:
        whole = lax.dynamic_slice_in_dim(whole, index[n], 1, axis)
    return whole


def _put(whole: Array, part: Array, axes: Sequence[int], index: Array) -> Array:
    """Return a stack with one of its elements put in its place."""
    at = [jnp.zeros((), jnp.int32)] * whole.ndim
    for n, axis in enumerate(axes):
        at[axis] = index[n]
    return lax.dynamic_update_slice(whole, part.astype(whole.dtype), at)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
@exactly
def _filled(
    find: Find, site: Site, options: Any, own: dict[str, Array], w: Any, minus: Any, index: Array, key: Array
) -> Any:
    """Return the factors with those of one element of the stack."""
    part = None if w is None else _as_matrix(site, _cut(site, dense(w), index))
    if part is not None and minus is not None:
        part -= _as_matrix(site, _cut_dense(site, minus, index))
    matrix = None if part is None else part.reshape(part.shape[-2:])
    placed = PLAIN.of_low_rank(site, *find(site, matrix, key, *options))
    stack = range(len(site.stack_axes))  # in front, in all factors
    return {name: _put(array, placed[name], stack, index) for name, array in own.items()}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
@exactly
def _less(site: Site, w: Array, factors: Mapping[str, Array], index: Array) -> Array:
    """Return a weight that is changed in one element of its stack."""
    own = dict(factors)  # beyond a layer's own rank they are zero
    for n in range(len(site.stack_axes)):
        own = {name: lax.dynamic_slice_in_dim(array, index[n], 1, n) for name, array in own.items()}
    less = asked(site.method, "less", "have another start")(site, _cut(site, w, index), own)
    return _put(w, less, site.stack_axes, index)
