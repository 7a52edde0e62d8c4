"""Adapters, `{path: {name: array}}`: how they start, what they have to be, and what they make of a program's inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.config import LoraConfig
from rslora_jax.methods.method import masked
from rslora_jax.methods.random import site_key
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site, from_paths, named_leaves
from rslora_jax.stored.form import is_stored
from rslora_jax.transform import compat
from rslora_jax.transform.program import is_array
from rslora_jax.transform.uses import of_uses
from rslora_jax.transform.views import View

Adapters = dict[str, dict[str, Array]]


def init_adapters(sites: Mapping[str, Site], key: Array, config: LoraConfig, params: Params) -> Adapters:
    """Return fresh adapters for every site.

    Raises:
      ValueError: a method starts from the base's values, and `params` is None.
    """
    leaves = named_leaves(params) if params is not None else {}

    def one(site: Site) -> dict[str, Array]:
        if site.method.needs_base and params is None:
            name = type(site.method).__name__
            raise ValueError(f"{name} starts from the values of {site.weight}: give the base, `lora.init(key, params)`")
        w = leaves[site.weight] if site.method.needs_base else None
        return dict(masked(site, site.method.init(site, site_key(key, site.path), w, config)))

    return {path: one(site) for path, site in sites.items()}


def adapter_shapes(sites: Mapping[str, Site], config: LoraConfig) -> Any:
    """Return the shapes and dtypes of adapters, a pytree of `jax.ShapeDtypeStruct`."""
    return {
        path: {name: jax.ShapeDtypeStruct(shape, config.dtype) for name, shape in site.factor_shapes.items()}
        for path, site in sites.items()
    }


def check_adapters(sites: Mapping[str, Site], adapters: Any) -> None:
    """Raise a ValueError that says what about the adapters does not fit the sites."""
    made = "they were made for another config or another base"
    if not isinstance(adapters, Mapping):
        raise ValueError(f"the adapters are of type {type(adapters).__name__}: `init` gives a dict of factors by path")
    for name, site in sites.items():
        if name not in adapters:
            raise ValueError(f"the adapters have none for {name}: {made}")
        factors, shapes = adapters[name], site.factor_shapes
        if not isinstance(factors, Mapping):
            raise ValueError(
                f"adapter {name} is of type {type(factors).__name__}: it is to be a dict of {', '.join(shapes)}"
            )
        for factor, shape in shapes.items():
            if factor not in factors:
                raise ValueError(f"adapter {name} has no {factor}: it needs one of shape {shape}")
            array = factors[factor]
            if not is_array(array) or not jnp.issubdtype(array.dtype, jnp.floating):
                what = getattr(array, "dtype", type(array).__name__)
                raise ValueError(f"adapter {name}/{factor} is of type {what}: it is to be a floating array of {shape}")
            if tuple(array.shape) != shape:
                raise ValueError(
                    f"adapter {name}/{factor} has shape {tuple(array.shape)}, and this config asks for {shape} "
                    f"(rank {site.rank}): {made}"
                )
        for factor in factors:
            if factor not in shapes:
                raise ValueError(f"adapter {name} has a {factor}, which this config's method does not use: {made}")
    for name in adapters:
        if name not in sites:
            raise ValueError(f"the adapters have {name}, which this config does not adapt")


def array_leaves(params: Params) -> dict[str, Any]:
    """Return the parameters that are arrays, or stored in a form of their own, by path."""
    return {name: leaf for name, leaf in named_leaves(params).items() if is_array(leaf)}


def varied(params: Params, sites: Mapping[str, Site], adapters: Adapters) -> tuple[Params, Adapters]:
    """Inside a `shard_map`, let each weight and its factors vary over the same devices, as their sum would."""
    leaves = named_leaves(params)
    made: Adapters = {}
    for weight, own in sites_by_weight(sites).items():
        arrays, tree = jax.tree.flatten((leaves[weight], {site.path: adapters[site.path] for site in own}))
        leaves[weight], several = jax.tree.unflatten(tree, compat.vary_together(*arrays))
        made |= several
    return from_paths(params, leaves), made


def sites_by_weight(sites: Mapping[str, Site]) -> dict[str, list[Site]]:
    """Return the sites of each weight by its path: one, or one for each of its uses."""
    found: dict[str, list[Site]] = {}
    for site in sites.values():
        found.setdefault(site.weight, []).append(site)
    return found


def views_of(
    leaves: Sequence[Any],
    names: Sequence[str],
    sites: Mapping[str, Site],
    adapters: Adapters,
    dress: Callable[[View], View] = lambda view: view,
) -> list[Any]:
    """Return a program's inputs, those that are adapted or stored as views; the first are the parameters of `names`.

    `dress` gives the view of an adapted weight what is to go along with it.
    """
    by_weight = sites_by_weight(sites)

    def one(w: Any, path: str) -> Any:
        own = by_weight.get(path)
        if own is None:
            return _plain(w)
        acting = {site.use: site.view(w, adapters[site.path]) for site in own}
        views = {use: dress(view) for use, view in acting.items() if isinstance(view, View)}
        return views.get("", acting[""]) if "" in acting else of_uses(views)

    own = [one(w, path) for w, path in zip(leaves, names, strict=False)]
    return [*own, *map(_plain, leaves[len(names) :])]


def _plain(w: Any) -> Any:
    """Return the view of a stored weight without an adapter, or an array as it is."""
    return View(w, (frozenset(),) * w.ndim, w.dtype, ()) if is_stored(w) else w
