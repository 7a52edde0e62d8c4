"""What a model carries from call to call beside its parameters: batch statistics, caches, keys and their counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.pytrees import PyTree
from rslora_jax.sites import named_leaves

if TYPE_CHECKING:
    from rslora_jax.train.loss import Loss


def with_state(loss: Loss) -> Loss:
    """Make a loss of a model with state from one that knows of none.

    Args:
      loss: `loss(run, batch) -> (sum, count)`, or with a key behind them, such as `logits_loss`.

    Returns:
      `loss(run, batch, state) -> (sum, count, state)`, for a model that gives `run(state, *args) -> (out, state)`.
      Each call of the model in the loss takes up the state that the one before it left.

    >>> twice = lambda run, batch: (run(batch) + run(batch), jnp.float32(1))
    >>> counting = lambda state, x: (x * state, state + 1)
    >>> [int(x) for x in with_state(twice)(counting, 10, 3)]
    [70, 1, 5]
    """

    def stateful(run: Callable[..., Any], batch: PyTree, state: Any, *key: Any) -> tuple[Any, Any, Any]:
        def plain(*args: Any, **kwargs: Any) -> Any:
            nonlocal state
            out, state = run(state, *args, **kwargs)
            return out

        total, count = loss(plain, batch, *key)
        return total, count, state

    return stateful


def call_loss(
    loss: Loss, run: Callable[..., Any], batch: PyTree, model_state: PyTree, *key: Any
) -> tuple[Any, Any, Any]:
    """Call a loss with what there is, a state and a key, and return (sum, count, state); the state may be None.

    Raises:
      ValueError: it does not return what it should, or a state of another form.
    """
    # A copy, since some states (Equinox's) may be used only once.
    state = () if model_state is None else (jax.tree.map(lambda leaf: leaf, model_state),)
    found = loss(run, batch, *state, *key)
    if not isinstance(found, tuple | list) or len(found) != 2 + len(state):
        wanted = "(sum, count, state), as it is given a state" if state else "(sum, count)"
        raise ValueError(f"the loss is to return {wanted}")
    if not state:
        return *found, None
    new = jax.tree.map(jnp.asarray, found[2])
    _check_form(new, model_state)
    return *found[:2], new


def _check_form(new: Any, old: Any) -> None:
    """Raise a ValueError where a state is not of the structure, shapes and dtypes of the one before."""
    news, olds = named_leaves(new), named_leaves(old)
    for name in {**olds, **news}:
        was, now = _form(olds.get(name)), _form(news.get(name))
        if was != now:
            raise ValueError(
                f"the loss returns a model state in which {name} is {now or 'missing'}, and was given one in which it "
                f"is {was or 'missing'}: a step takes up what the last one left, so they are to be alike"
            )
    now, was = map(str, (jax.tree.structure(new), jax.tree.structure(old)))
    if now != was:
        raise ValueError(
            f"the loss returns a model state of structure {now}, and was given one of {was}: a step takes up what the "
            "last one left, so they are to be alike"
        )


def _form(leaf: Any) -> str | None:
    """Write an array's dtype and shape."""
    return None if leaf is None else f"{jnp.asarray(leaf).dtype}{list(jnp.shape(leaf))}"


def averaged(model_state: PyTree, axis: str) -> PyTree:
    """Average a state's numbers over a mapped axis of devices; integers and keys stay each device's own."""

    def mean(leaf: Array) -> Array:
        return lax.pmean(leaf, axis) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(mean, model_state)
