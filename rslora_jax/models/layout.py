"""Convert a model's variables between one subtree a layer and one stacked subtree.

A looped model keeps `layers_0`, `layers_1`, ...; a scanned one keeps `layers`, whose leaves have a leading
axis of layers. The numbers are the same, so a checkpoint of one serves the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rslora_jax.config import LoraConfig
from rslora_jax.methods.method import of_layer
from rslora_jax.wrap import Adapters, Lora

_PREFIX = "layers_"


def stack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Turn looped variables into scanned ones, in every collection.

    Leaves of shape (...) under `layers_0` .. `layers_{L-1}` become leaves (L, ...) under `layers`; all else
    stays.

    Raises:
      ValueError: no layers are there, or a number is missing.

    >>> looped = {"params": {"layers_0": {"w": jnp.zeros(3)}, "layers_1": {"w": jnp.ones(3)}, "norm": 1}}
    >>> jax.tree.map(jnp.shape, stack_layers(looped))
    {'params': {'layers': {'w': (2, 3)}, 'norm': ()}}
    """
    return {name: _stack(name, collection) for name, collection in variables.items()}


def unstack_layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Turn scanned variables into looped ones, in every collection: the inverse of `stack_layers`.

    Raises:
      ValueError: no stacked `layers` is there.

    >>> scanned = {"params": {"layers": {"w": jnp.zeros((2, 3))}}}
    >>> jax.tree.map(jnp.shape, unstack_layers(scanned))
    {'params': {'layers_0': {'w': (3,)}, 'layers_1': {'w': (3,)}}}
    """
    return {name: _unstack(name, collection) for name, collection in variables.items()}


def unstack_adapters(lora: Lora, adapters: Adapters) -> tuple[LoraConfig, Adapters]:
    """Turn the adapters of a scanned model into those of the looped one: (its config, its adapters).

    A scan copies each layer's weights before it uses them, so that on a CPU a looped model writes a token in a third of
    the time; it takes longer to compile.

    >>> from rslora_jax import wrap
    >>> params = {"params": {"layers": {"w": jnp.ones((2, 4, 4))}}}
    >>> scanned = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["params"]["layers"]["w"])[0]
    >>> lora = wrap(scanned, params, jnp.ones((1, 4)), config=LoraConfig(rank=3, alpha=5))
    >>> config, adapters = unstack_adapters(lora, lora.init(jax.random.key(0)))
    >>> config.targets, adapters["params/layers_1/w"]["a"].shape
    (('params/layers_0/w', 'params/layers_1/w'), (4, 3))
    """
    found: Adapters = {}
    whole, ranks, alphas = list[str](), dict[str, int](), dict[str, float]()
    for path, site in lora.sites.items():
        holder, key, rest = path.partition("/layers/")
        layers = range(site.shape[0]) if key and site.stack_axes[:1] == (0,) else [None]
        for i in layers:
            one = path if i is None else f"{holder}/{_PREFIX}{i}/{rest}"
            own = site if i is None else site.of_layer(i)
            if site.scaled and not own.rank:
                continue
            found[one] = adapters[path] if i is None else of_layer(site, adapters[path], i)
            if site.scaled:
                ranks[one], alphas[one] = own.rank, own.alpha
            elif site.kind == "trained":
                whole.append(one)
    options: dict[str, Any] = {"targets": tuple(ranks), "trained": tuple(whole), "exclude": ()}
    return dataclasses.replace(lora.config, **options, rank_pattern=ranks, alpha_pattern=alphas), found


def _stack(name: str, collection: Mapping[str, Any]) -> dict[str, Any]:
    count = sum(key.startswith(_PREFIX) for key in collection)
    wanted = [f"{_PREFIX}{i}" for i in range(count)]
    if not count or not all(key in collection for key in wanted):
        raise ValueError(
            f"{name!r} has no run layers_0, layers_1, ... to stack: it holds {', '.join(sorted(collection))}"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[collection[key] for key in wanted])
    return {"layers": stacked} | {k: v for k, v in collection.items() if k not in wanted}


def _unstack(name: str, collection: Mapping[str, Any]) -> dict[str, Any]:
    if "layers" not in collection:
        raise ValueError(f"{name!r} has no stacked 'layers' to take apart: it holds {', '.join(sorted(collection))}")
    count = len(jax.tree.leaves(collection["layers"])[0])
    parts = {f"{_PREFIX}{i}": jax.tree.map(lambda leaf, i=i: leaf[i], collection["layers"]) for i in range(count)}
    return parts | {k: v for k, v in collection.items() if k != "layers"}
