"""Data-free initialisation: A random with a variance that does not depend on the rank, B zero."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.sites import Site


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


INITS: Mapping[str, Callable[..., Array]] = {"uniform": uniform, "gaussian": gaussian}


# A's shape is what is compiled for, in a third of a second on a CPU: one program for all sites would have as many
# generators of random bits, and take that for each. A function of the caller's may be none that can be compiled.
COMPILED = {name: jax.jit(draw, static_argnums=(1, 2, 3)) for name, draw in INITS.items()}


def init_adapters(sites: Mapping[str, Site], key: Array, how: str | Callable[..., Array], dtype: Any) -> dict:
    """Return fresh adapters for every site: `{path: {"a": (*stack, *in, r), "b": (*stack, r, *out)}}`.

    Each path has a random stream of its own, so adding a site changes no other's start.
    """
    draw = how if callable(how) else COMPILED[how]

    def one(site: Site) -> dict[str, Array]:
        # A look-up meets one row of A, not a sum over all of them.
        fan_in = 1 if site.kind == "embedding" else site.in_size
        stream = jax.random.fold_in(key, hash_name(site.path))
        return {"a": draw(stream, site.a_shape, dtype, fan_in), "b": jnp.zeros(site.b_shape, dtype)}

    return {path: one(site) for path, site in sites.items()}


def hash_name(name: str) -> int:
    """Return a 31-bit number for a name, the same in every process."""
    import zlib

    return zlib.crc32(name.encode()) & 0x7FFFFFFF
