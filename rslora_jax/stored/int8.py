"""Weights in 8-bit integers, symmetric, with one scale for each out channel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rslora_jax.stored.exact import TINY, divided
from rslora_jax.stored.form import Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Stored):
    """A weight in 8 bits: `codes * scale`.

    Attributes:
      codes: int8, from -127 to 127, of the weight's shape.
      scale: float32, of the weight's shape with its in-axes of size 1.
      dtype: dtype of the weight.
      depth: how many axes `inner` has.
    """

    codes: Array
    scale: Array
    dtype: Any = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(default=2, metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return tuple(self.codes.shape[: self.codes.ndim - self.depth])

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape behind the stack."""
        return tuple(self.codes.shape[self.codes.ndim - self.depth :])

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        return {"codes": (1,) * self.depth, "scale": (1,) * self.depth}

    def dense(self) -> Array:
        return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)

    def rows(self, at: Array) -> Array:
        scale = self.scale if self.scale.shape[0] == 1 else self.scale[at]
        return dataclasses.replace(self, codes=self.codes[at], scale=scale).dense()


def int8(weight: Any, axis: int | Sequence[int] = 0, depth: int = 0) -> Int8:
    """Round a weight to 8 bits.

    Args:
      weight: an array (*stack, *inner) of numbers that are finite.
      axis: the in-axis of `inner`, or all of them: each place along the others, an out channel, has a scale of its own.
      depth: how many axes the stack has.

    >>> w = int8(jnp.array([[1.0, 2.54], [-0.5, 0.0]]))
    >>> w.codes.tolist(), [round(scale * 127, 3) for scale in w.scale[0].tolist()]
    ([[127, 127], [-64, 0]], [1.0, 2.54])
    """
    return _int8(jnp.asarray(weight), in_axes(axis, depth, jnp.ndim(weight)), depth)


def in_axes(axis: int | Sequence[int], depth: int, ndim: int) -> tuple[int, ...]:
    """Return in-axes of what is behind a stack as axes of the whole array."""
    axes = (axis,) if isinstance(axis, int) else axis
    return tuple(depth + n % (ndim - depth) for n in axes)


def _int8_of(weight: Array, axes: tuple[int, ...], depth: int) -> Int8:
    wide = weight.astype(jnp.float32)
    most = jnp.abs(wide).max(axes, keepdims=True)
    scale = jnp.maximum(divided(jnp.where(most > 0, most, 1), 127), TINY)
    return Int8(jnp.round(wide / scale).astype(jnp.int8), scale, jnp.dtype(weight.dtype), weight.ndim - depth)


_int8 = jax.jit(_int8_of, static_argnums=(1, 2))
