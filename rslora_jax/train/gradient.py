"""A batch's mean loss and its gradient, taken in parts and over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.train.loss import Loss
from rslora_jax.wrap import Adapters

# The model with adapters bound: `bind(adapters) -> run`, where a loss calls `run(*args)`.
Bind = Callable[[Adapters], Callable[..., Any]]


class Measured(NamedTuple):
    """What one batch says of the adapters.

    Attributes:
      value: its mean loss.
      tokens: the number of tokens with loss, float32.
      grads: the gradient of `value`.
      value_fn: the mean loss on this batch as a pure function of adapters, for optimisers that try some out. It
        costs nothing where it is not called.
    """

    value: Array
    tokens: Array
    grads: Adapters
    value_fn: Callable[[Adapters], Array]


def measure(
    loss: Loss,
    bind: Bind,
    adapters: Adapters,
    batch: Any,
    *,
    parts: int = 1,
    key: Array | None = None,
    axis: str | None = None,
) -> Measured:
    """Measure the mean loss of a batch and its gradient.

    Args:
      loss: `loss(run, batch)`, or `loss(run, batch, key)` where there is a key.
      bind: gives the model that has adapters bound.
      adapters: where to measure.
      batch: its arrays have their rows first; its scalars are given whole to each part.
      parts: in how many parts to take it, one after the other. Each draws from `fold_in(key, number)`.
      key: a typed key.
      axis: the name of a mapped axis of devices, each with a batch of its own: means are over all of them.
    """
    first = lax.axis_index(axis) * parts if axis else 0

    def total(adapters: Adapters, part: Any, number: Any) -> tuple[Array, Array]:
        return loss(bind(adapters), part, *(() if key is None else (jax.random.fold_in(key, number),)))

    with_gradient = jax.value_and_grad(total, has_aux=True)

    def summed(of: Callable[..., Any], adapters: Adapters) -> Any:
        sums = over_parts(of, adapters, batch, parts, first)
        return lax.psum(sums, axis) if axis else sums

    def mean(adapters: Adapters) -> Array:
        value, count = summed(total, adapters)
        return per(count, value)

    def mean_and_gradient(adapters: Adapters) -> tuple[Array, Adapters]:
        (value, count), grads = summed(with_gradient, adapters)
        return per(count, (value, grads))

    # With a rule of its own the gradient, too, is summed part by part and over devices, and keeps no part's values.
    value_fn = jax.custom_vjp(mean)
    value_fn.defvjp(mean_and_gradient, lambda grads, g: (jax.tree.map(lambda x: x * jnp.asarray(g, x.dtype), grads),))
    (value, count), grads = summed(with_gradient, adapters)
    value, grads = per(count, (value, grads))
    return Measured(value, jnp.asarray(count, jnp.float32), grads, value_fn)


def per(count: Any, tree: Any) -> Any:
    """Divide by a number of tokens; a batch may hold none with loss, such as the filling of a last one."""
    return jax.tree.map(lambda x: x / jnp.maximum(jnp.asarray(count, jnp.float32), 1).astype(x.dtype), tree)


def over_parts(of: Callable[..., Any], adapters: Adapters, batch: Any, parts: int, first: Any) -> Any:
    """Return the sum of `of(adapters, part, number)` over a batch's parts, whose numbers begin with `first`."""
    if parts == 1:
        return of(adapters, batch, first)

    def one(sums: Any, numbered: tuple[Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of(adapters, numbered[1], numbered[0])), None

    dealt = split(batch, parts)
    shapes = jax.eval_shape(of, adapters, jax.tree.map(lambda x: x[0], dealt), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(one, zeros, (first + jnp.arange(parts), dealt))[0]


def split(batch: Any, parts: int) -> Any:
    """Deal a batch's rows out: row n goes to part n modulo `parts`, on a new first axis; a scalar goes to each.

    Dealt like this and not cut, a part has rows of every device on which the batch lies.

    >>> split({"rows": jnp.arange(6), "weight": 0.5}, 2)["rows"].tolist()
    [[0, 2, 4], [1, 3, 5]]
    """

    def one(rows: Any) -> Array:
        rows = jnp.asarray(rows)
        if rows.ndim == 0:
            return jnp.broadcast_to(rows, parts)
        if rows.shape[0] % parts:
            raise ValueError(
                f"a batch array of shape {rows.shape} cannot be taken in {parts} parts: its first axis is not a "
                f"multiple of accumulate={parts}"
            )
        return jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0)

    return jax.tree.map(one, batch)
