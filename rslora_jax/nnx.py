"""The door for Flax NNX: a module as a pure function and its parameters."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def from_nnx(model: nnx.Module, method: Callable[..., Any] | None = None) -> tuple[Callable[..., Any], dict]:
    """Return an NNX module as (fn, params), ready for `wrap`.

    Args:
      model: the module; it is left as it is.
      method: what to call, such as `Model.encode`; by default the module itself.

    Returns:
      `fn(params, *args, **kwargs)`, pure: what a call changes in the module (a cache, a count) is not
      returned. `params`: a plain dict of arrays with the values of all the module's variables.

    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> fn, params = from_nnx(model)
    >>> sorted(params), fn(params, jnp.ones((2, 4))).shape
    (['bias', 'kernel'], (2, 3))
    """
    graph, state = nnx.split(model)

    def fn(params: dict, *args: Any, **kwargs: Any) -> Any:
        new = nnx.clone(state)
        nnx.replace_by_pure_dict(new, params)
        module = nnx.merge(graph, new)
        return (module if method is None else method.__get__(module))(*args, **kwargs)

    return fn, nnx.to_pure_dict(state)
