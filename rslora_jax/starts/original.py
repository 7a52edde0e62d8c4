"""Adapters that were trained over a changed base, as adapters of the base that it was."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax import scaling
from rslora_jax.adapters import Adapters
from rslora_jax.config import LoraConfig, first_match
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
    own = {path: (2 * site.rank, _alpha(site.gamma, 2 * site.rank, config)) for path, site in sites.items()}
    rank, alpha = 2 * config.rank, _same(config.alpha, config.rank, config)
    of_ranks: Any = config.rank_pattern
    of_alphas: Any = config.alpha_pattern
    ranks = [(pattern, 2 * of) for pattern, of in of_ranks]
    alphas = [(pattern, _same(of, config.rank, config)) for pattern, of in of_alphas]
    # What these do not say, of a weight narrower than the rank or under a scaling of the caller's, is said first.
    ranks = [(glob.escape(p), r) for p, (r, _) in own.items() if first_match(p, ranks, rank) != r] + ranks
    alphas = [(glob.escape(p), a) for p, (_, a) in own.items() if not _near(first_match(p, alphas, alpha), a)] + alphas
    more: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas, "allow_large_rank": True}
    made = dataclasses.replace(config, rank=rank, alpha=alpha, **more)
    return made, {
        path: _of_config(site, own[path][0], first_match(path, alphas, alpha), config) for path, site in sites.items()
    }


def less(site: Site, factors: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapter whose update is that of one less that of another, of both ranks together."""
    gone = rescaled(site, {name: jnp.asarray(array) for name, array in start.items()}, -1)

    def one(name: str, axes: Any) -> Any:
        if RANK not in axes:
            return factors[name]
        join = np.concatenate if isinstance(factors[name], np.ndarray) else jnp.concatenate
        return join([factors[name], gone[name].astype(factors[name].dtype)], axes.index(RANK))

    return {name: one(name, axes) for name, axes in site.factors.items()}


def _of_config(site: Site, rank: int, alpha: float, config: LoraConfig) -> Site:
    """Return a site as `wrap` makes it of its rank and alpha."""
    return dataclasses.replace(site, rank=rank, alpha=alpha, gamma=scaling.gamma(rank, alpha, config.scaling))


def _same(alpha: float, rank: int, config: LoraConfig) -> float:
    """Return the alpha that gives twice the rank the same gamma."""
    return _alpha(scaling.gamma(rank, alpha, config.scaling), 2 * rank, config)


def _alpha(gamma: float, rank: int, config: LoraConfig) -> float:
    """Return the alpha that gives a rank its gamma."""
    return gamma / scaling.gamma(rank, 1.0, config.scaling)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-12 * abs(other)
