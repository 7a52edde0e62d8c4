"""Two-operand einsums in the form that costs least, the derivatives that JAX makes of them included.

On a CPU, XLA hands a product to a library that takes matrices stored row by row. Two things then cost more than
the product itself (measured on 2 cores, float32, 4 x 512 rows, width 1024, rank 8; base product 20 ms):

- The gradient of the second factor contracts the two axes of the rows, for which XLA writes a transposed copy of
  dy, and does again, row by row, what made dy: 6.1 ms, and 0.5 ms with the rows as one axis.
- The gradient of the first factor has the rank last, a matrix of 1024 x 8: 4.7 ms, and 0.6 ms with the rank first.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def contract(subscripts: str, left: Array, right: Array, precision: Any = None, dtype: Any = None) -> Array:
    """Return an einsum of two arrays; on a CPU, axes that stay neighbours are made one for it.

    Args:
      subscripts: as of `jnp.einsum`, explicit, each letter once in a term.
      left, right: the operands.
      precision, dtype: the einsum's `precision` and `preferred_element_type`.

    >>> contract("abc,cd->abd", jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
    (2, 3, 5)
    """
    operands, out = subscripts.split("->")
    terms = (*operands.split(","), out)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=dtype)
    # Elsewhere the compiler chooses layouts, and a partitioner may hold the rows cut along both of their axes.
    if jax.default_backend() != "cpu" or any(map(sharded, (left, right))):
        return einsum(subscripts, left, right)
    size = dict(zip(terms[0] + terms[1], (*left.shape, *right.shape), strict=True))
    inner = neighbours(terms)
    heads = lambda term: "".join(c for c in term if c not in inner.values())

    def run(letter: str) -> list[int]:
        return [size[letter], *(run(inner[letter]) if letter in inner else [])]

    flat = lambda array, term: jnp.reshape(array, [math.prod(run(c)) for c in heads(term)])
    text = f"{heads(terms[0])},{heads(terms[1])}->{heads(out)}"
    return jnp.reshape(einsum(text, flat(left, terms[0]), flat(right, terms[1])), [size[c] for c in out])


def neighbours(terms: Sequence[str]) -> dict[str, str]:
    """Return for each letter the one that follows it in every term that has either of them.

    >>> neighbours(("abc", "cde", "abde"))
    {'a': 'b', 'd': 'e'}
    """
    found = {}
    for letter in dict.fromkeys("".join(terms)):
        after = {term[term.index(letter) + 1 :][:1] if letter in term else None for term in terms} - {None}
        follower = after.pop() if len(after) == 1 else ""
        if follower and all((letter in term) == (follower in term) for term in terms):
            found[letter] = follower
    return found


def sharded(array: Array) -> bool:
    """Say whether an array's type says how it is cut among devices."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def rank_first(factor: Array, axis: int) -> Array:
    """Return a factor, whose rank is at `axis`, as it is; on a CPU, its gradient is formed with the rank first."""
    # On a GPU the barrier only keeps the cast to float32 out of the product that makes the gradient: a pass over it
    # more (H200, rank 64: 1.19 of the base's step with it and 1.18 without at 1B's widths, 1.14 and 1.13 at 7B's).
    return gradient_rank_first(factor, axis) if jax.default_backend() == "cpu" else factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def gradient_rank_first(factor: Array, axis: int) -> Array:
    return factor


@gradient_rank_first.defjvp
def _(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Without the barrier, XLA makes one product, rank last, of the product and the transposition that follows it.
    moved = lax.optimization_barrier(jnp.moveaxis(tangents[0], axis, 0))
    return primals[0], jnp.moveaxis(moved, 0, axis)
