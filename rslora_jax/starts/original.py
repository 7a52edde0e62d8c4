"""Adapters that were trained over a changed base, as adapters of the base that it was."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax import scaling
from rslora_jax.adapters import Adapters
from rslora_jax.config import LoraConfig
from rslora_jax.layers import Layer, pattern_of_layer, value_of_layer, with_layers
from rslora_jax.methods.method import RANK, rescaled
from rslora_jax.sites import Site
from rslora_jax.wrap import Lora


def for_original_base(lora: Lora, adapters: Adapters, start: Adapters) -> tuple[Lora, Adapters]:
    """Return adapters of the base as it was before a start changed it, which do what these do over the changed one.

    Over W' = W - gamma A0 B0 they act as W' + gamma A B = W + gamma [A, A0] [B, -B0]: of twice the rank, with an alpha
    that gives the same gamma (under rslora sqrt(2) alpha). Of DoRA the magnitudes are the same.

    Args:
      lora: from `wrap`.
      adapters: the trained ones.
      start: what they began as, from `pissa`, `olora` or `lora_ga`.

    Returns:
      (lora, adapters), for `merge`, `save_peft` and all else; `lora.config` gives the same to `wrap`.

    >>> import rslora_jax as rslora
    >>> from rslora_jax.starts import pissa
    >>> base, x = {"w": jnp.arange(12.0).reshape(4, 3)}, jnp.ones((1, 4))
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, x, config=rslora.LoraConfig(rank=1, alpha=3))
    >>> params, start = pissa(lora, base, jax.random.key(0))
    >>> trained = jax.tree.map(lambda factor: factor + 0.5, start)
    >>> whole, adapters = for_original_base(lora, trained, start)
    >>> whole.sites["w"].rank, bool(jnp.allclose(whole.apply(base, adapters, x), lora.apply(params, trained, x)))
    (2, True)
    """
    base = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in lora.shapes.items()}
    for one in (adapters, start):
        lora.check(base, one)
    config, sites = doubled(lora.config, lora.sites)
    joined = {path: less(site, adapters[path], start[path]) for path, site in lora.sites.items()}
    return dataclasses.replace(lora, config=config, sites=MappingProxyType(sites), compiled={}), joined


def doubled(config: LoraConfig, sites: Mapping[str, Site]) -> tuple[LoraConfig, dict[str, Site]]:
    """Return a config, and sites, of twice the rank and the same gamma."""
    of_ranks: Any = config.rank_pattern
    of_alphas: Any = config.alpha_pattern
    rank, alpha = 2 * config.rank, _same(config.alpha, config.rank, config)
    ranks = [(pattern, 2 * of) for pattern, of in of_ranks]
    alphas = [(pattern, _same(of, config.rank, config)) for pattern, of in of_alphas]
    # What these do not say, of a weight narrower than the rank or under a scaling of the caller's, is said first.
    ranked = {path: site for path, site in sites.items() if site.scaled}
    own = {(path, n): layer for path, site in ranked.items() for n, layer in _layers(site)}
    more_ranks = [
        (pattern_of_layer(glob.escape(path), n), 2 * layer.rank)
        for (path, n), layer in own.items()
        if value_of_layer(path, n, ranks, rank) != 2 * layer.rank
    ]
    wanted = {key: _alpha(layer.gamma, 2 * layer.rank, config) for key, layer in own.items()}
    more_alphas = [
        (pattern_of_layer(glob.escape(path), n), one)
        for (path, n), one in wanted.items()
        if not math.isclose(value_of_layer(path, n, alphas, alpha), one, rel_tol=1e-12)
    ]
    patterns: dict[str, Any] = {"rank_pattern": more_ranks + ranks, "alpha_pattern": more_alphas + alphas}
    made = dataclasses.replace(config, rank=rank, alpha=alpha, allow_large_rank=True, **patterns)
    return made, {path: _of_config(site, made) if path in ranked else site for path, site in sites.items()}


def less(site: Site, factors: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapter whose update is that of one less that of another, of both ranks together."""
    if not site.scaled:  # as a value that is trained whole, which is that over any base
        return dict(factors)
    gone = rescaled(site, {name: jnp.asarray(array) for name, array in start.items()}, -1)

    def one(name: str, axes: Any) -> Any:
        if RANK not in axes:
            return factors[name]
        host = isinstance(factors[name], np.ndarray)
        both = (np if host else jnp).concatenate(
            [factors[name], gone[name].astype(factors[name].dtype)], axes.index(RANK)
        )
        if not site.layers:
            return both
        order, there = _places(site, axes)
        moved = jnp.where(there, jnp.take_along_axis(both, order, axes.index(RANK)), 0)
        return np.asarray(moved) if host else moved

    return {name: one(name, axes) for name, axes in site.factors.items()}


def _places(site: Site, axes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return where each layer has both its ranks in front of what is beyond them, and which of these there are."""
    at = np.arange(2 * site.rank)
    ranks = np.asarray([[layer.rank] for layer in site.layers])
    # The second one's begin at the rank of the arrays.
    order = np.where(at < ranks, at, np.minimum(at + site.rank - ranks, 2 * site.rank - 1))
    sizes = {site.layer_axis: len(site.layers), RANK: 2 * site.rank}
    shape = [sizes.get(axis, 1) for axis in axes]
    turned = axes.index(RANK) < axes.index(site.layer_axis)
    return tuple((array.T if turned else array).reshape(shape) for array in (order, at < 2 * ranks))  # type: ignore[return-value]


def _layers(site: Site) -> list[tuple[int | None, Layer]]:
    """Return what each layer has that has an adapter; of a weight whose layers do not differ, what all have."""
    if not site.layers:
        return [(None, Layer(site.rank, site.alpha, site.gamma))]
    return [(n, layer) for n, layer in enumerate(site.layers) if layer.rank]


def _of_config(site: Site, config: LoraConfig) -> Site:
    """Return a site as `wrap` makes it by a config of twice its rank."""

    def own(layer: int | None) -> Layer | None:
        if layer is not None and site.layers and not site.layers[layer].rank:
            return None
        rank = value_of_layer(site.path, layer, config.rank_pattern, config.rank)
        alpha = value_of_layer(site.path, layer, config.alpha_pattern, config.alpha)
        return Layer(rank, alpha, scaling.gamma(rank, alpha, config.scaling))

    return with_layers(dataclasses.replace(site, layers=()), own)


def _same(alpha: float, rank: int, config: LoraConfig) -> float:
    """Return the alpha that gives twice the rank the same gamma."""
    return _alpha(scaling.gamma(rank, alpha, config.scaling), 2 * rank, config)


def _alpha(gamma: float, rank: int, config: LoraConfig) -> float:
    """Return the alpha that gives a rank its gamma."""
    return gamma / scaling.gamma(rank, 1.0, config.scaling)
