"""A function as a program: traced once for each shape and each set of static arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rslora_jax.transform import compat
from rslora_jax.transform.objects import change, changes, values_of, variables_of

ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Static:
    """The part of a call that a trace depends on by value: its structure, and what is not an array."""

    tree: Any
    leaves: tuple[Any, ...]
    is_array: tuple[bool, ...]


class Program:
    """The traces of one function; `jax.jit` keeps them."""

    def __init__(self, fn: Callable[..., Any]):
        def flat(static: Static, *arrays: Any) -> Any:
            given, fixed = iter(arrays), iter(static.leaves)
            leaves = [next(given) if is_array else next(fixed) for is_array in static.is_array]
            params, args, kwargs = jax.tree.unflatten(static.tree, leaves)
            objects = variables_of((args, kwargs))
            before = values_of(objects)
            return fn(params, *args, **kwargs), changes(objects, before)

        flat.__name__ = flat.__qualname__ = getattr(fn, "__name__", type(fn).__name__)
        self.jitted = jax.jit(flat, static_argnums=0)

    def trace(self, params: Any, args: tuple, kwargs: dict) -> tuple[compat.Jaxpr, Any, list[Any]]:
        """Return (jaxpr, tree of what it returns, the arrays it takes: those of `params` come first)."""
        leaves, tree = jax.tree.flatten((params, args, kwargs))
        is_array = tuple(isinstance(leaf, ARRAYS) for leaf in leaves)
        arrays = [leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes]
        fixed = tuple(leaf for leaf, yes in zip(leaves, is_array, strict=True) if not yes)
        for leaf in fixed:
            try:
                hash(leaf)
            except TypeError:
                raise TypeError(
                    f"an argument of type {type(leaf).__name__} is neither an array nor hashable, so the function "
                    "cannot be traced with it: pass arrays, or values such as True, None or a string"
                ) from None
        jaxpr, out_tree = compat.trace(self.jitted, Static(tree, fixed, is_array), *arrays)
        return compat.live(jaxpr), out_tree, arrays

    def returned(self, tree: Any, outs: list[Any], args: tuple, kwargs: dict) -> Any:
        """Return the function's result from its program's outputs; the NNX objects it was given change too."""
        out, changed = jax.tree.unflatten(tree, outs)
        change(variables_of((args, kwargs)), changed)
        return out
