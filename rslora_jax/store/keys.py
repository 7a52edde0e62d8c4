"""Random keys: typed, raw, of any implementation, and as the plain arrays that files hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.pytrees import PyTree
from rslora_jax.sites import path_name


def is_key(leaf: Any) -> bool:
    """Say whether an array holds typed keys.

    >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0))
    (True, False)
    """
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def typed(key: Array) -> Array:
    """Return one key as a typed one, which knows its implementation; a raw one is of JAX's default.

    Raises:
      ValueError: it is no key, more than one, or raw and not of the default implementation.

    >>> typed(jax.random.PRNGKey(3)) == jax.random.key(3)
    Array(True, dtype=bool)
    """
    if not is_key(key):
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError as error:
            raise ValueError(
                f"{getattr(key, 'dtype', type(key).__name__)}{list(jnp.shape(key))} is no raw key of the default "
                f"implementation ({jax.config.jax_default_prng_impl}): "  # type: ignore[attr-defined]
                "give a typed key, such as jax.random.key(0, impl='rbg')"
            ) from error
    if key.shape:
        raise ValueError(f"keys of shape {key.shape} were given, where one key is needed")
    return key


def as_data(tree: PyTree) -> tuple[Any, dict[str, str]]:
    """Return a tree with the raw data of every key in its place, and the implementations by path.

    >>> as_data({"key": jax.random.key(1), "w": 2})
    ({'key': Array([0, 1], dtype=uint32), 'w': 2}, {'key': 'threefry2x32'})
    """
    impls: dict[str, str] = {}

    def one(path: Any, leaf: Any) -> Any:
        if not is_key(leaf):
            return leaf
        impls[path_name(path)] = str(jax.random.key_impl(leaf))
        return jax.random.key_data(leaf)

    return jax.tree_util.tree_map_with_path(one, tree), impls


def as_keys(tree: PyTree, impls: Mapping[str, str]) -> PyTree:
    """Return a tree with keys of the given implementations for the raw data at their paths.

    >>> as_keys({"key": jnp.array([0, 1], jnp.uint32)}, {"key": "threefry2x32"})["key"] == jax.random.key(1)
    Array(True, dtype=bool)
    """

    def one(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        return jax.random.wrap_key_data(leaf, impl=impls[name]) if name in impls else leaf

    return jax.tree_util.tree_map_with_path(one, tree)
