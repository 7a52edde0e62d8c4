"""How A starts: random, with a variance that does not depend on the rank."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def uniform(key: Array, shape: tuple[int, ...], dtype: Any, fan_in: int) -> Array:
    """Draw A uniformly from +-1/sqrt(fan_in): variance 1 / (3 fan_in), as PEFT does for LoRA's A.

    PEFT calls it Kaiming-uniform with a = sqrt(5). Learning rates found there carry over.
    """
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key: Array, shape: tuple[int, ...], dtype: Any, fan_in: int) -> Array:
    """Draw A from a normal distribution of variance 1 / fan_in."""
    # Compiled, a division by a constant would be a product with its reciprocal, and rounded otherwise than op by op.
    drawn, by = jax.lax.optimization_barrier(
        (jax.random.normal(key, shape, dtype), jnp.asarray(math.sqrt(fan_in), dtype))
    )
    return drawn / by


_INITS: Mapping[str, Callable[..., Array]] = {"uniform": uniform, "gaussian": gaussian}


# A's shape is what is compiled for, in a third of a second on a CPU: one program for all sites would have as many
# generators of random bits, and take that for each. A function of the caller's may be none that can be compiled.
_COMPILED = {name: jax.jit(draw, static_argnums=(1, 2, 3)) for name, draw in _INITS.items()}


def drawer(how: str | Callable[..., Array]) -> Callable[..., Array]:
    """Return the function (key, shape, dtype, fan_in) -> A that a config's `init` names or is."""
    return how if callable(how) else _COMPILED[how]


def site_key(key: Array, path: str) -> Array:
    """Return a site's own key, so that adding a site changes no other's start; the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
