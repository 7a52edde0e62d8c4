"""A sum over chunks of data whose gradient is formed together with its value, chunk by chunk.

A loss over a large vocabulary is such a sum: no more than one chunk's logits are ever held, and, other than with
`jax.checkpoint`, none are formed again, since the gradient of a sum is known before what it is multiplied by is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_RECOMPUTED = contextvars.ContextVar("recomputed", default=False)


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Trace the body with sums whose gradient is formed after their value, from each chunk again.

    For readings that are taken as gradients and are not linear in what arrives: a gradient formed with the value meets
    1, and only then what its sum is multiplied by.

    >>> with recomputed():
    ...     float(jax.grad(lambda w: chunk_sum(lambda x: w * jnp.sum(x), jnp.ones((3, 2))))(2.0))
    6.0
    """
    token = _RECOMPUTED.set(True)
    try:
        yield
    finally:
        _RECOMPUTED.reset(token)


def chunks(array_BxP: Array, size: int) -> Array:
    """Give (C, B, S, ...) chunks of the second axis of (B, P, ...), alike and of at most `size`, filled up with zeros.

    >>> chunks(jnp.arange(1, 6)[None], 3).tolist()
    [[[1, 2, 3]], [[4, 5, 0]]]
    """
    B, P, *rest = array_BxP.shape
    count = -(-P // size)
    size = -(-P // count)
    padding = [(0, 0), (0, count * size - P), *[(0, 0)] * len(rest)]
    return jnp.moveaxis(jnp.pad(array_BxP, padding).reshape(B, count, size, *rest), 1, 0)


def chunk_sum(value: Callable[..., Array], x_Cx: Array, *data_Cx: Any) -> Array:
    """Sum `value(x, *data)` over chunks.

    Gradients by `x` and by what `value` closes over are formed with the value, of a chunk at a time, and only of what
    is differentiated: nothing of a frozen head's size is. Reverse mode alone, of any order.

    Args:
      value: gives a float32 scalar; it is traced once.
      x_Cx: an array of floats with the chunks along its first axis.
      *data_Cx: arrays likewise, of which there is no gradient.

    Returns:
      A float32 scalar.

    >>> w, x = jnp.float32(3), jnp.arange(6.0).reshape(3, 2)
    >>> total = lambda w, x: chunk_sum(lambda x, y: jnp.sum(w * x * y), x, 10 + jnp.zeros((3, 2)))
    >>> float(total(w, x)), float(jax.grad(total)(w, x)), jax.grad(total, 1)(w, x)[0].tolist()
    (450.0, 150.0, [30.0, 30.0])
    """
    chunks = (x_Cx, *data_Cx)
    if _RECOMPUTED.get():
        return jnp.sum(lax.map(jax.checkpoint(lambda chunk: value(*chunk)), chunks))
    # What the function closes over becomes arguments, whatever is differentiated, vectorised or split over devices.
    program = jax.make_jaxpr(value)(*jax.tree.map(lambda array: array[0], chunks))
    return _summed(functools.partial(jax.core.eval_jaxpr, program.jaxpr), tuple(program.consts), chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(evaluate: Callable[..., Any], consts: tuple[Any, ...], chunks: tuple[Any, ...]) -> Array:
    def one(_: None, chunk: tuple[Any, ...]) -> tuple[None, Array]:
        return None, evaluate(consts, *jax.tree.leaves(chunk))[0]

    return jnp.sum(lax.scan(one, None, chunks)[1])


def _forward(evaluate: Callable[..., Any], consts: Sequence[Any], chunks: Sequence[Any]) -> tuple[Array, Any]:
    """Return the sum and its gradients by what is differentiated, of constants in float32 until they are added up."""
    moved = [n for n, const in enumerate(consts) if const.perturbed]
    values = [const.value for const in consts]
    data = jax.tree.map(lambda array: array.value, chunks, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    by_x = chunks[0].perturbed

    def one(sums: list[Array], chunk: tuple[Any, ...]) -> tuple[list[Array], tuple[Array, Array | None]]:
        def value(some: list[Array], x: Array) -> Array:
            held = [some[moved.index(n)] if n in moved else each for n, each in enumerate(values)]
            return evaluate(held, x, *jax.tree.leaves(chunk[1:]))[0]

        total, pull = jax.vjp(value, [values[n] for n in moved], chunk[0])
        found, gradient = pull(jnp.ones_like(total))
        sums = [s + by.astype(s.dtype) for s, by in zip(sums, found, strict=True)]
        return sums, (total, gradient if by_x else None)

    start = [jnp.zeros_like(values[n], dtype=jnp.promote_types(values[n].dtype, jnp.float32)) for n in moved]
    sums, (totals, gradients) = lax.scan(one, start, data)
    by_consts: list[Any] = [None] * len(values)
    for n, s in zip(moved, sums, strict=True):
        by_consts[n] = s.astype(values[n].dtype)
    return jnp.sum(totals), (tuple(by_consts), (gradients, *(None for _ in chunks[1:])))


def _backward(evaluate: Callable[..., Any], kept: Any, ahead: Array) -> Any:
    """Multiply the gradients; None is one of zeros."""
    return jax.tree.map(lambda gradient: (ahead * gradient).astype(gradient.dtype), kept)


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
