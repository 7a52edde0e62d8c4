"""Ranks shared out over layers by how much of the variance of their data a direction explains (arXiv 2410.07170)."""

from __future__ import annotations

import dataclasses
import glob
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from rslora_jax.config import LoraConfig
from rslora_jax.layers import pattern_of_layer
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.starts.stream import Progress, started, unseen
from rslora_jax.starts.variance import spread
from rslora_jax.wrap import Lora

# A weight, or one layer of a weight that holds several.
_Place = tuple[str, int | None]


def eva_config(
    lora: Lora,
    params: Params,
    batches: Iterable[Any],
    rho: float = 2.0,
    *,
    loss: Callable[..., Any] | None = None,
    key: Array | None = None,
    passes: int = 3,
    progress: Progress = unseen,
) -> LoraConfig:
    """Return a config whose ranks are shared out over layers, to wrap with again, and then to start with `eva`.

    As many ranks as there were, where they explain most of the variance of what their weight meets: at most rho times
    a weight's own rank, and no less than 1. Alpha stays, so that each gamma is that of the new rank by the
    config's own rule, alpha / sqrt(r): PEFT multiplies alpha by the change of the rank, which keeps alpha / r as it
    was, and under the rank-stabilised scale would make gamma grow with sqrt(r).

    Args:
      lora: from `wrap`.
      params: the base.
      batches: as of `eva`.
      rho: 1 leaves the ranks as they are.
      loss, passes, progress: as of `eva`.
      key: a PRNG key, by default `jax.random.key(0)`.

    Returns:
      The config of `lora` with a `rank_pattern` that names single weights, and of stacks single layers.

    Raises:
      ValueError: rho is below 1, or as of `eva`.

    >>> import jax.numpy as jnp, rslora_jax as rslora
    >>> base, x = {"u": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}, jnp.eye(4)
    >>> config = rslora.LoraConfig(rank=2, alpha=3)
    >>> lora = rslora.wrap(lambda p, x: x @ p["u"] + x[:1] @ p["v"], base, x, config=config)
    >>> eva_config(lora, base, [(x,)]).rank_pattern  # of what v meets, one direction is all
    (('u', 3), ('v', 1))
    """
    if not rho >= 1:
        raise ValueError(f"rho={rho} is below 1, the least: a layer's rank is at most rho times what it was")
    sites = {path: site for path, site in started(lora).items() if site.kind != "embedding"}
    most = {path: _most(site, site.rank, rho) for path, site in sites.items()}
    key = jax.random.key(0) if key is None else key
    found = spread(lora, params, key, most, batches, loss=loss, passes=passes, progress=progress)
    shares: dict[_Place, np.ndarray] = {}
    before: dict[_Place, int] = {}
    weight: dict[_Place, int] = {}
    for path, site in sites.items():
        for layer, rank, own in _by_layer(site, np.asarray(found[path].shares, np.float64)):
            at = path, layer
            shares[at], before[at], weight[at] = own.mean(0)[: _most(site, rank, rho)], rank, len(own)
    ranks = _shared_out(shares, before, weight)
    own_pattern = [(pattern_of_layer(glob.escape(path), n), rank) for (path, n), rank in ranks.items()]
    changed = [pair for pair, at in zip(own_pattern, ranks, strict=True) if ranks[at] != before[at]]
    return dataclasses.replace(lora.config, rank_pattern=(*changed, *lora.config.rank_pattern))  # type: ignore[arg-type]


def _most(site: Site, rank: int, rho: float) -> int:
    """Return the rank that a layer may come to have."""
    return max(rank, min(round(rho * rank), site.in_size, site.out_size))


def _shared_out(
    shares: Mapping[_Place, np.ndarray], before: Mapping[_Place, int], weight: Mapping[_Place, int]
) -> dict[_Place, int]:
    """Return as many ranks as before, those with the largest shares first, each place at least one.

    Args:
      shares: of each place's directions, the largest first; it gets no more ranks than these.
      before: the rank that each has.
      weight: of how many matrices each is, which all have its rank.

    >>> rare, common = np.array([0.4, 0.3, 0.2]), np.array([0.9, 0.01, 0.001])
    >>> _shared_out({("u", None): rare, ("v", None): common}, {("u", None): 2, ("v", None): 2},
    ...            {("u", None): 1, ("v", None): 1})
    {('u', None): 3, ('v', None): 1}
    """
    left = sum(before[place] * weight[place] for place in before) - sum(weight.values())
    ranks = dict.fromkeys(shares, 1)
    waiting = [(-own[1], number, place) for number, (place, own) in enumerate(shares.items()) if len(own) > 1]
    heapq.heapify(waiting)
    while waiting and left > 0:
        _, number, place = heapq.heappop(waiting)
        if weight[place] > left:
            continue
        ranks[place] += 1
        left -= weight[place]
        if ranks[place] < len(shares[place]):
            heapq.heappush(waiting, (-shares[place][ranks[place]], number, place))
    return ranks


def _by_layer(site: Site, shares: np.ndarray) -> list[tuple[int | None, int, np.ndarray]]:
    """Return the number of each layer that has an adapter, its rank, and the shares of all matrices that it has."""
    if site.layer_axis is None:
        return [(None, site.rank, shares[None])]
    moved = np.moveaxis(shares, site.stack_axes.index(site.layer_axis), 0)
    ranks = [layer.rank for layer in site.layers] or [site.rank] * len(moved)
    each = enumerate(zip(ranks, moved, strict=True))
    return [(n, rank, own.reshape(-1, shares.shape[-1])) for n, (rank, own) in each if rank]
