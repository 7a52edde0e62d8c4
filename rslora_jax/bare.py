"""A function as it is, without adapters, over parameters of which some are stored in a form of their own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from rslora_jax.adapters import array_leaves, views_of
from rslora_jax.pytrees import Params
from rslora_jax.stored.form import is_stored
from rslora_jax.transform.interpreter import Walk, as_arrays
from rslora_jax.transform.program import Program
from rslora_jax.transform.rules import RULES


@dataclasses.dataclass(frozen=True)
class Bare:
    """A function of (params, ...) that takes stored weights too: each becomes dense where it is used.

    It goes by the rules by which `Lora.apply` goes, with no adapters. Two of one function are equal, so that a jit that
    has it among its static arguments compiles once.

    Attributes:
      fn: a pure JAX function, such as a Flax model's `apply`, which itself takes arrays alone.

    >>> import jax.numpy as jnp
    >>> from rslora_jax.stored import int8
    >>> run = Bare(lambda params, x: x @ params["w"])
    >>> run({"w": int8(jnp.full((2, 3), 2.0))}, jnp.ones((1, 2))).tolist()
    [[4.0, 4.0, 4.0]]
    """

    fn: Callable[..., Any]

    @functools.cached_property
    def _program(self) -> Program:
        return Program(self.fn)

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Return what the function gives for the weights that the stored ones stand for."""
        given = array_leaves(params)
        if not any(map(is_stored, given.values())):
            return self.fn(params, *args, **kwargs)
        jaxpr, tree, leaves = self._program.trace(params, args, kwargs)
        walk = Walk(RULES)
        outs = walk.run(jaxpr, views_of(leaves, list(given), {}, {}))
        return self._program.returned(tree, as_arrays(walk, outs), args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bare, (self.fn,)
