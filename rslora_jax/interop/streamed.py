"""W + gamma A B of one tensor, in numpy and float64, without a program to compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.rounding import Rounding
from rslora_jax.sites import Site


def merge_one(
    name: str, weight: np.ndarray, site: Site, factors: Mapping[str, Any], layer: int | None, dtype: str
) -> tuple[np.ndarray, Rounding]:
    """Return W + gamma A B in `dtype`, in the layout of W, and what rounding did to it.

    Args:
      name: what an error calls it.
      weight: the weight; that of one layer where `layer` is a number.
      site, factors: the adapter of the whole weight.
      layer: the place on the weight's first axis, where layers are stacked there.
      dtype: what to round to.

    >>> site = Site("w", (2, 2), (0,), (1,), (), "linear", rank=1, alpha=1.0, gamma=1.0)
    >>> factors = {"a": np.ones((2, 1)), "b": np.full((1, 2), 2.0**-9)}
    >>> merged, rounding = merge_one("w", np.ones((2, 2)), site, factors, None, "bfloat16")
    >>> float(merged[0, 0]), rounding.relative  # next to 1 there is 1 + 2^-7: nothing is left of the update
    (1.0, 1.0)
    """
    update = update_of(site, factors, layer)
    sizes = float(np.linalg.norm(update)), float(np.linalg.norm(weight.astype(np.float64)))
    exact = np.add(update, weight.astype(np.float64), out=update)
    merged = rounded(name, exact, dtype)
    error = float(np.linalg.norm(np.subtract(exact, merged.astype(np.float64), out=exact)))
    return merged, Rounding(name, 1, error, *sizes)


def update_of(site: Site, factors: Mapping[str, Any], layer: int | None = None) -> np.ndarray:
    """Return gamma A B in float64 in the layout of the weight, or of one element of its first axis."""
    a, b = factors["a"], factors["b"]
    stack, drop = site.stack_axes, 0
    if layer is not None:
        if stack[:1] != (0,):
            raise ValueError(f"{site.path} holds layers on its first axis, but its adapter is one for all of them")
        a, b, stack, drop = a[layer], b[layer], stack[1:], 1
    sizes = site.sizes(stack)
    a = np.asarray(a).astype(np.float64).reshape(*sizes, site.in_size, site.rank)
    b = np.asarray(b).astype(np.float64).reshape(*sizes, site.rank, site.out_size)
    product = a @ (site.gamma * b)
    order = (*stack, *site.in_axes, *site.out_axes)
    return product.reshape(site.sizes(order)).transpose(np.argsort([axis - drop for axis in order]))


def rounded(name: str, weight: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a dtype.

    Raises:
      ValueError: a number is not finite, before or after.
    """
    with np.errstate(over="ignore"):
        cast = weight.astype(jnp.dtype(dtype))
    if np.isfinite(cast).all():
        return cast
    wide = weight.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name} holds numbers that are not finite: the base or the adapters are broken")
    raise ValueError(
        f"{name} overflows {dtype}: its largest number is {np.abs(wide).max():.3g}; merge in bfloat16 or float32"
    )
