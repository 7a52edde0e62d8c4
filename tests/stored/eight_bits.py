"""A stored form of a test's own: 8-bit integers with a scale for each out channel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.stored import Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EightBits(Stored):
    """`codes * scale`, with codes of shape (*stack, i, o) and scales of shape (*stack, 1, o)."""

    codes: Array
    scale: Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    @property
    def inner(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[-2:])

    def dense(self) -> Array:
        return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)


def eight_bits(w: Any) -> EightBits:
    """Round a weight to 8 bits."""
    scale = jnp.maximum(jnp.max(jnp.abs(w.astype(jnp.float32)), -2, keepdims=True), 1e-8) / 127
    return EightBits(jnp.round(w / scale).astype(jnp.int8), scale, jnp.dtype(w.dtype))
