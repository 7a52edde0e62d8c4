"""A second stored form of a test's own: blocks of the flattened weight, whose axes its arrays do not have."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.stored import Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks(Stored):
    """`codes * scale`, codes of shape (*stack, blocks, size) and scales of shape (*stack, blocks, 1)."""

    codes: Array
    scale: Array
    inner: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    def dense(self) -> Array:
        wide = self.codes.astype(jnp.promote_types(self.scale.dtype, jnp.float32))
        return (wide * self.scale).reshape(self.shape).astype(self.dtype)


def blocks(w: Any, depth: int = 0, size: int = 4) -> Blocks:
    """Round a weight to blocks of 8 bits; the first `depth` axes are the stack's."""
    inner = w.shape[depth:]
    flat = w.reshape(*w.shape[:depth], -1, math.gcd(size, math.prod(inner)))
    scale = (jnp.maximum(jnp.abs(flat).max(-1, keepdims=True), 0.1) / 100).astype(w.dtype)
    return Blocks(jnp.round(flat / scale).astype(jnp.int8), scale, inner, jnp.dtype(w.dtype))
