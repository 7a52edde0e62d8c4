"""One adapter for each example of a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.adapters import check_adapters
from rslora_jax.pytrees import Params
from rslora_jax.several.stack import neutral, vanishes
from rslora_jax.sites import named_leaves
from rslora_jax.transform.product import factored
from rslora_jax.transform.program import is_array
from rslora_jax.wrap import Adapters, Lora


def per_example(lora: Lora, in_axes: Any = 0, out_axes: Any = 0, *, kwarg_axes: Any = 0) -> Callable[..., Any]:
    """Return `apply(params, stacked, which, *args, **kwargs)`, in which each example has an adapter of its own.

    The function is evaluated on one example at a time, a batch of one, under `jax.vmap`: the base's products stay one
    for the whole batch, and each example adds its own two thin ones. No sum with a weight is formed for an example,
    unless the weight has no low-rank form. Composes with jit and grad; other adapters or another `which` of the same
    shapes compile nothing.

    Args:
      lora: such as `stack` gives.
      in_axes: where the batch lies in the arguments: an axis, or a tuple of one for each, as of `jax.vmap`; None where
        an argument has no batch. What is no array has none.
      out_axes: where it lies in what the function returns; None where that has no batch, and does not depend on it.
      kwarg_axes: where it lies in keyword arguments: one for all, or a dict by name.

    Returns:
      The function; `stacked` has an axis of adapters in front of all arrays, and `which` (batch,) says, in whole
      numbers, which one is for each example: -1 is none, the base alone. An argument `dropout_key` is as that of
      `lora.apply`, with masks of its own for each example.

    Raises:
      ValueError: where `which` or the axes do not fit; as `lora.apply`.

    >>> import rslora_jax as rslora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((3, 6))
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=2, alpha=3))
    >>> ones = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0)))
    >>> lora, stacked = rslora.stack([(lora, ones), (lora, jax.tree.map(jnp.negative, ones))])
    >>> per_example(lora)(params, stacked, jnp.array([0, -1, 1]), x)[:, 0].round().tolist()
    [31.0, 6.0, 31.0]
    """
    # With the sum of a weight and its update, each example would have a weight of its own.
    walk = dataclasses.replace(lora.walk, product=factored, calls=type(lora.walk.calls)())
    own = dataclasses.replace(lora, walk=walk, compiled={})

    def apply(
        params: Params,
        stacked: Adapters,
        which: Any,
        *args: Any,
        dropout_key: Array | None = None,
        **kwargs: Any,
    ) -> Any:
        which = which if is_array(which) else np.asarray(which)
        _check(lora, stacked, which)
        none = _none(lora, params)
        leaves, tree = jax.tree.flatten((args, kwargs))
        axes = [*_axes_of(in_axes, args, "in_axes"), *_axes_of(kwarg_axes, kwargs, "kwarg_axes")]
        axes = [axis if is_array(leaf) else None for axis, leaf in zip(axes, leaves, strict=True)]
        keys = None if dropout_key is None else jax.random.split(dropout_key, len(which))

        def one(number: Array, key: Array | None, *batched: Any) -> Any:
            left = iter(batched)
            pairs = zip(axes, leaves, strict=True)
            each = [leaf if axis is None else jnp.expand_dims(next(left), axis) for axis, leaf in pairs]
            its_args, its_kwargs = jax.tree.unflatten(tree, each)
            adapters = _picked(stacked, number, none)
            return _without_batch(own.apply(params, adapters, *its_args, dropout_key=key, **its_kwargs), out_axes)

        batched = [leaf for axis, leaf in zip(axes, leaves, strict=True) if axis is not None]
        mapped = [axis for axis in axes if axis is not None]
        over = (0, None if keys is None else 0, *mapped)
        return jax.vmap(one, in_axes=over, out_axes=out_axes)(jnp.asarray(which), keys, *batched)

    return apply


def _check(lora: Lora, stacked: Adapters, which: Any) -> None:
    """Raise a ValueError that says what does not fit: the adapters, or the numbers of those of the examples."""
    sizes = {array.shape[:1] for own in stacked.values() for array in own.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "the arrays have no axis of adapters in front that is of one size in all: make them with rslora_jax.stack"
        )
    ((count,),) = sizes
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), stacked)
    check_adapters(lora.sites, shapes)
    if which.ndim != 1 or not jnp.issubdtype(which.dtype, jnp.integer):
        raise ValueError(f"which is {which.dtype} of shape {which.shape}: give whole numbers of shape (batch,)")
    if not isinstance(which, jax.core.Tracer):
        wrong = [int(n) for n in np.asarray(which) if not -1 <= n < count]
        if wrong:
            raise ValueError(
                f"which has {wrong[0]}, and there are {count} adapters: give 0 to {count - 1}, or -1 for none"
            )


def _none(lora: Lora, params: Params) -> Adapters:
    """Return, where it is not of zeros, what an adapter that changes nothing is made of."""
    found: Adapters = {}
    leaves: Mapping[str, Any] = {}
    for path, site in lora.sites.items():
        if others := [name for name in site.factors if not vanishes(site, name)]:
            leaves = leaves or named_leaves(params)
            own = neutral(site, lora.config.dtype, leaves[site.weight])
            found[path] = {name: own[name] for name in others}
    return found


def _picked(stacked: Adapters, number: Array, none: Adapters) -> Adapters:
    """Return the adapters of one number; below 0, one that changes nothing."""

    def one(path: str, name: str, array: Array) -> Array:
        # Beyond the axis there are zeros, and no select over the arrays is needed.
        own = jnp.asarray(array).at[number].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        other = none.get(path, {}).get(name)
        return own if other is None else jnp.where(number < 0, other, own)

    return {path: {name: one(path, name, array) for name, array in own.items()} for path, own in stacked.items()}


def _axes_of(prefix: Any, tree: Any, what: str) -> list[int | None]:
    """Return the batch's axis of each leaf of the arguments."""
    if isinstance(prefix, Mapping):  # of keywords that are not named there is no batch
        prefix = {name: prefix.get(name) for name in tree}
    return _broadcast(prefix, tree, what)


def _broadcast(prefix: Any, tree: Any, what: str) -> list[int | None]:
    """Return the axes that a prefix of a pytree gives to its leaves."""
    try:
        whole = jax.tree.broadcast(prefix, tree, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(
            f"{what}={prefix!r} does not fit: give an axis, None, or a structure of them that begins as that of the "
            "arguments, or of the result, does"
        ) from error
    return jax.tree.leaves(whole, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _without_batch(out: Any, out_axes: Any) -> Any:
    """Take the axis of the batch of one out of a result."""
    leaves, tree = jax.tree.flatten(out)
    axes = _broadcast(out_axes, out, "out_axes")
    for axis, leaf in zip(axes, leaves, strict=True):
        if axis is not None and (not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != 1):
            raise ValueError(
                f"the function gives an array of shape {leaf.shape} for a batch of one, which has no batch on axis "
                f"{axis}: say with out_axes where it lies, or let the function return something for each example"
            )
    squeezed = [leaf if axis is None else jnp.squeeze(leaf, axis) for axis, leaf in zip(axes, leaves, strict=True)]
    return jax.tree.unflatten(tree, squeezed)
