"""Passes over data with adapters of a rank of their own, whose gradients are what a start looks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.methods.lora import METHOD as PLAIN
from rslora_jax.methods.random import site_key
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.starts.stream import Progress, exactly
from rslora_jax.wrap import Lora

# `act(params, adapters, batch)` gives a gradient by the adapters.
Act = Callable[[Params, Adapters, Any], Adapters]

Matrices = dict[str, Array]  # by path, (*stack, in, r) or (*stack, r, out)


def with_rank(lora: Lora, ranks: Mapping[str, int]) -> Lora:
    """Return the same with plain adapters of these ranks and of scale 1, on the weights of these paths alone."""
    plain: dict[str, Any] = {"alpha": 1.0, "gamma": 1.0, "method": PLAIN, "layers": ()}
    sites = {p: dataclasses.replace(lora.sites[p], rank=rank, **plain) for p, rank in ranks.items()}
    return dataclasses.replace(lora, sites=MappingProxyType(sites), compiled={})


def filled(lora: Lora, first: Matrices | None, second: Matrices | None) -> Adapters:
    """Return plain adapters of matrices; those that are not given are zero."""

    def one(path: str, site: Site) -> dict[str, Array]:
        stack = site.sizes(site.stack_axes)
        left = first[path] if first else jnp.zeros((*stack, site.in_size, site.rank))
        right = second[path] if second else jnp.zeros((*stack, site.rank, site.out_size))
        return PLAIN.of_low_rank(site, left, right)

    return {path: one(path, site) for path, site in lora.sites.items()}


def split(lora: Lora, adapters: Adapters) -> tuple[Matrices, Matrices]:
    """Return plain adapters as their matrices."""
    both = {path: PLAIN.low_rank(site, adapters[path]) for path, site in lora.sites.items()}
    return {path: pair[0] for path, pair in both.items()}, {path: pair[1] for path, pair in both.items()}


def drawn(lora: Lora, key: Array, *, first: bool) -> Matrices:
    """Draw the first or the second matrix of each adapter, every site from a key of its own."""

    def one(path: str, site: Site) -> Array:
        shape = (site.in_size, site.rank) if first else (site.rank, site.out_size)
        return jax.random.normal(site_key(key, path), (*site.sizes(site.stack_axes), *shape))

    return {path: one(path, site) for path, site in lora.sites.items()}


@dataclasses.dataclass
class Passes:
    """Sum a gradient over all batches, as often as it is asked for; compiled once.

    Attributes:
      act: gives the gradient of one batch.
      batches: the data.
      total: how many passes there will be.
      progress: told the batches done and their number in all.
    """

    act: Act
    batches: Sequence[Any]
    total: int
    progress: Progress

    def __post_init__(self) -> None:
        self._act, self._done = jax.jit(exactly(self.act)), 0

    def sum(self, params: Params, adapters: Adapters) -> Adapters:
        """Return the sum over the batches."""
        found: Any = None
        for batch in self.batches:
            one = self._act(params, adapters, batch)
            found = one if found is None else jax.tree.map(jnp.add, found, one)
            jax.block_until_ready(found)
            self._done += 1
            self.progress(self._done, self.total * len(self.batches))
        return found


def listed(batches: Iterable[Any] | None, name: str) -> list[Any]:
    """Return batches as a list.

    Raises:
      ValueError: there are none.
    """
    found = list(batches or ())
    if not found:
        raise ValueError(f"{name} looks at data and was given none: give it some batches, such as eight")
    return found


def summed(value: Any) -> Array:
    """Return one number of what a function returned that all its floating numbers have a part in."""
    parts = [jnp.sum(x.real) for x in jax.tree.leaves(value) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return sum((part.astype(jnp.float32) for part in parts), jnp.zeros(()))
