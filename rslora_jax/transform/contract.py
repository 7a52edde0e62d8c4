"""Two-operand einsums in the form that costs least, the derivatives that JAX makes of them included.

Which form that is depends on what XLA makes of it on a platform; all forms give the same.

On a CPU, XLA hands a product to a library that takes matrices stored row by row. Two things then cost more than
the product itself (measured on 2 cores, float32, 4 x 512 rows, width 1024, rank 8; base product 20 ms):

- The gradient of the second factor contracts the two axes of the rows, for which XLA writes a transposed copy of
  dy, and does again, row by row, what made dy: 6.1 ms, and 0.5 ms with the rows as one axis.
- The gradient of the first factor has the rank last, a matrix of 1024 x 8: 4.7 ms, and 0.6 ms with the rank first.

On a GPU, XLA joins products that share an operand, and for it writes their other operands side by side: W and A, which
both meet x, and W and B, which both meet the gradient of the result. That copies the frozen weights at every step
(H200, bfloat16, 4096 tokens, beside the base alone). At 1B's widths XLA does so from rank 128: there a step takes 1.24
times the base's and 1.21 where they are kept apart, with 0.35 GB less. At 7B's it does from rank 256: there 1.24 and
1.18, at rank 2048 2.06 and 1.98. Products of a smaller rank it splits along what they sum and does not join with the
base's; keeping them apart then changes a step by less than 1 %.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.views import alike

# At 64 keeping apart does not pay, at 128 it does at width 2048 and costs nothing at 4096 (docs/benchmark/README.md).
APART_FROM_RANK = 128


def contract(
    subscripts: str, left: Array, right: Array, precision: Any = None, dtype: Any = None, platform: str = "cpu"
) -> Array:
    """Return an einsum of two arrays; on a CPU, axes that stay neighbours are made one for it.

    Args:
      subscripts: as of `jnp.einsum`, explicit, each letter once in a term.
      left, right: the operands.
      precision, dtype: the einsum's `precision` and `preferred_element_type`.
      platform: what it is compiled for.

    >>> contract("abc,cd->abd", jnp.ones((2, 3, 4)), jnp.ones((4, 5))).shape
    (2, 3, 5)
    """
    left, right = alike(left, right)
    operands, out = subscripts.split("->")
    terms = (*operands.split(","), out)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=dtype)
    # Elsewhere the compiler chooses layouts, and a partitioner may hold the rows cut along both of their axes.
    symbols = not all(isinstance(n, int) for n in (*left.shape, *right.shape))  # of which no product may be a size
    if platform != "cpu" or symbols or any(map(_sharded, (left, right))):
        return einsum(subscripts, left, right)
    size = dict(zip(terms[0] + terms[1], (*left.shape, *right.shape), strict=True))
    inner = neighbours(terms)

    def heads(term: str) -> str:
        return "".join(c for c in term if c not in inner.values())

    def run(letter: str) -> list[int]:
        return [size[letter], *(run(inner[letter]) if letter in inner else [])]

    def flat(array: Array, term: str) -> Array:
        return jnp.reshape(array, [math.prod(run(c)) for c in heads(term)])

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


def _sharded(array: Array) -> bool:
    """Say whether an array's type says how it is cut among devices."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def rank_first(factor: Array, axis: int, platform: str) -> Array:
    """Return a factor, whose rank is at `axis`, as it is; on a CPU, its gradient is formed with the rank first."""
    # On a GPU the barrier only keeps the cast to float32 out of the product that makes the gradient: a pass more (H200,
    # rank 64, beside the base alone: 1.19 with it and 1.18 without at 1B's widths, 1.14 and 1.13 at 7B's).
    return _gradient_rank_first(factor, axis) if platform == "cpu" else factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gradient_rank_first(factor: Array, axis: int) -> Array:
    return factor


@_gradient_rank_first.defjvp
def _(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Without the barrier, XLA makes one product, rank last, of the product and the transposition that follows it.
    moved = lax.optimization_barrier(jnp.moveaxis(tangents[0], axis, 0))
    return primals[0], jnp.moveaxis(moved, 0, axis)


def apart(x: Array, rank: int, platform: str) -> Array:
    """Return data as it is, on its way to a factor; on a GPU, out of XLA's sight as that which meets the base."""
    return lax.optimization_barrier(x) if _joined(rank, platform) else x


def gradient_apart(update: Array, rank: int, platform: str) -> Array:
    """Return an update as it is; on a GPU, its gradient is out of XLA's sight as that of the base's result."""
    return _behind_barrier(update) if _joined(rank, platform) else update


def _joined(rank: int, platform: str) -> bool:
    """Say whether XLA would join an adapter's products with the base's."""
    return platform == "gpu" and rank >= APART_FROM_RANK


@jax.custom_jvp
def _behind_barrier(update: Array) -> Array:
    return update


@_behind_barrier.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Only on the way back: on the way there it would keep XLA from adding the update where the product makes it.
    return primals[0], lax.optimization_barrier(tangents[0])
