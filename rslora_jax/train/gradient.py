"""A batch's mean loss and its gradient, taken in parts and over devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.pytrees import PyTree
from rslora_jax.train.carry import averaged, call_loss
from rslora_jax.train.loss import Loss
from rslora_jax.wrap import Adapters

# The model with adapters bound: `bind(adapters, number of the part) -> run`, where a loss calls `run(*args)`.
Bind = Callable[[Adapters, Any], Callable[..., Any]]


class Measured(NamedTuple):
    """Hold what one batch says of the adapters.

    Attributes:
      value: its mean loss.
      tokens: the number of tokens with loss, float32.
      grads: the gradient of `value`.
      value_fn: the mean loss on this batch as a pure function of adapters, for optimisers that try some out. It
        costs nothing where it is not called.
      model_state: what the model carries on, or None.
    """

    value: Array
    tokens: Array
    grads: Adapters
    value_fn: Callable[[Adapters], Array]
    model_state: PyTree = None


def mean_gradient(
    loss: Loss,
    bind: Bind,
    adapters: Adapters,
    batch: PyTree,
    *,
    parts: int = 1,
    key: Array | None = None,
    axis: str | None = None,
    model_state: PyTree = None,
) -> Measured:
    """Measure the mean loss of a batch and its gradient.

    Args:
      loss: `loss(run, batch)`; where there is a state, a key or both, it takes them too, in this order.
      bind: gives the model that has adapters bound, for the part of a number.
      adapters: where to measure.
      batch: its arrays have their rows first; its scalars are given whole to each part.
      parts: in how many parts to take it, one after the other. Each draws from `fold_in(key, number)`.
      key: a typed key.
      axis: the name of a mapped axis of devices, each with a batch of its own: means are over all of them, those of
        the numbers in the state too.
      model_state: what the model starts with, if it has state; each part takes up what the one before it left.
    """
    first = lax.axis_index(axis) * parts if axis else 0

    def total(adapters: Adapters, state: Any, part: Any, number: Any) -> tuple[Array, tuple[Array, Any]]:
        keys = () if key is None else (jax.random.fold_in(key, number),)
        value, count, state = call_loss(loss, bind(adapters, number), part, state, *keys)
        return value, (count, state)

    def sums_alone(adapters: Adapters, *given: Any) -> tuple[Any, Any]:
        value, (count, state) = total(adapters, *given)
        return (value, count), state

    def with_gradient(adapters: Adapters, *given: Any) -> tuple[Any, Any]:
        (value, (count, state)), grads = jax.value_and_grad(total, has_aux=True)(adapters, *given)
        return (value, count, grads), state

    def summed(of: Callable[..., Any], adapters: Adapters) -> tuple[Any, Any]:
        sums, state = _over_parts(functools.partial(of, adapters), model_state, batch, parts, first)
        return (lax.psum(sums, axis), averaged(state, axis)) if axis else (sums, state)

    def mean(adapters: Adapters) -> Array:
        (value, count), _ = summed(sums_alone, adapters)
        return _per(count, value)

    def mean_and_gradient(adapters: Adapters) -> tuple[Array, Adapters]:
        (value, count, grads), _ = summed(with_gradient, adapters)
        return _per(count, (value, grads))

    # With a rule of its own the gradient, too, is summed part by part and over devices, and keeps no part's values.
    value_fn = jax.custom_vjp(mean)
    value_fn.defvjp(mean_and_gradient, lambda grads, g: (jax.tree.map(lambda x: x * jnp.asarray(g, x.dtype), grads),))
    (value, count, grads), state = summed(with_gradient, adapters)
    value, grads = _per(count, (value, grads))
    return Measured(value, jnp.asarray(count, jnp.float32), grads, value_fn, state)


def _per(count: Any, tree: PyTree) -> PyTree:
    """Divide by a number of tokens; a batch may hold none with loss, such as the filling of a last one."""
    return jax.tree.map(lambda x: x / jnp.maximum(jnp.asarray(count, jnp.float32), 1).astype(x.dtype), tree)


def _over_parts(of: Callable[..., Any], state: Any, batch: PyTree, parts: int, first: Any) -> tuple[Any, Any]:
    """Return (the sum over a batch's parts, the last state) of `of(state, part, number) -> (sums, state)`.

    The numbers begin with `first`.
    """
    if parts == 1:
        return of(state, batch, first)

    def one(carry: tuple[Any, Any], numbered: tuple[Array, Any]) -> tuple[Any, None]:
        number, part = numbered
        sums, state = of(carry[1], part, number)
        return (jax.tree.map(jnp.add, carry[0], sums), state), None

    dealt = deal(batch, parts)
    shapes, _ = jax.eval_shape(of, state, jax.tree.map(lambda x: x[0], dealt), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(one, (zeros, state), (first + jnp.arange(parts), dealt))[0]


def deal(batch: PyTree, parts: int) -> PyTree:
    """Deal a batch's rows out: row n goes to part n modulo `parts`, on a new first axis; a scalar goes to each.

    Dealt like this and not cut, a part has rows of every device on which the batch lies.

    >>> deal({"rows": jnp.arange(6), "weight": 0.5}, 2)["rows"].tolist()
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
