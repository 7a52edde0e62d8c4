"""Arithmetic whose results do not depend on what a compiler makes of it."""

import jax.numpy as jnp
from jax import Array

TINY = float(jnp.finfo("float32").tiny)  # to divide by: what is smaller is nothing on most devices


def added(product: Array, term: Array) -> Array:
    """Return the sum of a product, rounded first, and a term.

    XLA on CPUs contracts the two to an operation that rounds once, through barriers and casts, but not past a maximum.
    """
    return jnp.maximum(product, jnp.finfo(product.dtype).min) + term


def divided(array: Array, number: float) -> Array:
    """Return an array divided by a number.

    Of a constant, XLA would multiply by the reciprocal, through barriers too; that of a choice it does not know.
    """
    return array / jnp.where(array == array, jnp.asarray(number, array.dtype), array)


def mean(numbers: Array) -> Array:
    """Return the mean along the last axis as if summed with twice float32's digits (Knuth's two-sum, in a tree)."""
    n, sums, errors = numbers.shape[-1], numbers, jnp.zeros_like(numbers)
    while sums.shape[-1] > 1:
        padding = [(0, 0)] * (sums.ndim - 1) + [(0, sums.shape[-1] % 2)]
        (a, b), (less, more) = (jnp.split(jnp.pad(array, padding), 2, -1) for array in (sums, errors))
        sums = a + b
        of_b = sums - a
        errors = less + more + ((a - (sums - of_b)) + (b - of_b))
    return divided(sums + errors, n)[..., 0]
