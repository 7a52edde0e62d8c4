"""Adapters of different rank, scale and targets in one shape, with an axis of adapters in front."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.adapters import check_adapters
from rslora_jax.config import LoraConfig
from rslora_jax.methods.method import RANK, own_arrays, rescaled
from rslora_jax.pytrees import Params
from rslora_jax.several.join import joined
from rslora_jax.sites import Site, named_leaves
from rslora_jax.wrap import Adapters, Lora


def stack(adapters: Iterable[tuple[Lora, Adapters]], params: Params = None) -> tuple[Lora, Adapters]:
    """Bring several adapters of one base into one shape: (their `Lora`, adapters with an axis of adapters in front).

    The sites are those of all, each with the largest rank that one of them has there. Smaller ranks are filled up with
    zeros, a weight or a layer that an adapter lacks has zeros, and each adapter's gamma is multiplied into it, in
    float32 at least, so that the gamma of all is 1. No dropout is in use.

    Args:
      adapters: pairs of what `wrap` returns and its adapters.
      params: the base, where the method starts from its values and an adapter lacks a weight that another has.

    Returns:
      lora: for one adapter of the result, or, through `per_example`, one for each example.
      stacked: `{path: {name: array}}` with shapes (adapters, *those of one).

    Raises:
      ValueError: there are none, they are of different bases, or there is a site that cannot be joined (its shape,
        axes or method differ, or one adapter is that of a whole table and another of one use); it is named. Or the base
        is needed.

    >>> import rslora_jax as rslora
    >>> params, x = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 6))}, jnp.ones((2, 6))
    >>> def fn(p, x):
    ...     return x @ p["w"] @ p["v"]
    >>> one = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=2, alpha=3, targets=["w"]))
    >>> other = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=5))
    >>> lora, stacked = stack([(lora, lora.init(jax.random.key(0))) for lora in (one, other)])
    >>> {path: {name: array.shape for name, array in own.items()} for path, own in stacked.items()}
    {'w': {'a': (2, 6, 3), 'b': (2, 3, 4)}, 'v': {'a': (2, 4, 3), 'b': (2, 3, 6)}}
    """
    pairs = list(adapters)
    if not pairs:
        raise ValueError("there are no adapters to stack: give at least one pair of a Lora and its adapters")
    for own, its in pairs:
        check_adapters(own.sites, its)
    lora = joined([own for own, _ in pairs])
    each = [_fitted(lora, own, its, params) for own, its in pairs]
    return lora, {
        path: {name: jnp.stack([one[path][name] for one in each]) for name in site.factors}
        for path, site in lora.sites.items()
    }


def vanishes(site: Site, name: str) -> bool:
    """Say whether an array of a site's adapter is a factor of an update, which is none where it is zero."""
    return RANK in site.factors[name] and getattr(site.method, "scaled", None) is not None


def neutral(site: Site, dtype: str, w: Any = None) -> dict[str, Array]:
    """Return an adapter that changes nothing: factors of zeros, and what else there is as the method starts with it.

    Args:
      site: the site.
      dtype: the adapter's.
      w: the base weight, where the method starts from its values.

    Raises:
      ValueError: it does, and `w` is None.
    """
    zeros = {name: jnp.zeros(shape, dtype) for name, shape in site.factor_shapes.items() if vanishes(site, name)}
    if len(zeros) == len(site.factors):
        return zeros
    if site.method.needs_base and w is None:
        raise ValueError(
            f"one adapter lacks {site.path}, and {type(site.method).__name__} that changes nothing there needs the "
            "base's values: give `params`"
        )
    return {**site.method.init(site, jax.random.key(0), w, LoraConfig(dtype=dtype)), **zeros}


def _fitted(lora: Lora, own: Lora, adapters: Adapters, params: Params) -> Adapters:
    """Return the adapters of one `Lora` as those of the joined one."""
    leaves: Mapping[str, Any] = named_leaves(params) if params is not None else {}
    dtype = lora.config.dtype

    def one(site: Site) -> dict[str, Any]:
        if site.path not in own.sites:
            return neutral(site, dtype, leaves.get(site.weight))
        its = own.sites[site.path]
        arrays: Mapping[str, Any] = {name: jnp.asarray(array, dtype) for name, array in adapters[site.path].items()}
        arrays = own_arrays(its, arrays)
        arrays = arrays if its.gamma == site.gamma else rescaled(its, arrays, its.gamma / site.gamma)
        wide = {name: _widened(arrays[name], axes, site.rank) for name, axes in site.factors.items()}
        return _with_all_layers(site, its, wide, leaves.get(site.weight))

    return {path: one(site) for path, site in lora.sites.items()}


def _widened(array: Array, axes: tuple[Any, ...], rank: int) -> Array:
    """Fill up the axis of the rank, if there is one, with zeros."""
    more = [(0, rank - size if axis == RANK else 0) for axis, size in zip(axes, array.shape, strict=True)]
    return jnp.pad(array, more) if more else array


def _with_all_layers(site: Site, its: Site, arrays: dict[str, Array], w: Any) -> dict[str, Array]:
    """Return an adapter that changes nothing in the layers where it is none: what is no factor is not zero there."""
    there = np.asarray([layer.rank > 0 for layer in its.layers])
    if there.all() or all(vanishes(site, name) for name in site.factors):
        return arrays
    none = neutral(site, str(next(iter(arrays.values())).dtype), w)

    def one(name: str, axes: tuple[Any, ...]) -> Array:
        return jnp.where(
            there.reshape([-1 if axis == site.layer_axis else 1 for axis in axes]), arrays[name], none[name]
        )

    return {name: one(name, axes) for name, axes in site.factors.items()}
