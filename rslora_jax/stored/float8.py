"""Weights in 8-bit floats (E4M3, arXiv 2209.05433), with one scale for each out channel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.stored.exact import TINY, divided
from rslora_jax.stored.form import Stored
from rslora_jax.stored.int8 import in_axes

DTYPE = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8(Stored):
    """A weight in 8 bits: `numbers * scale`.

    Attributes:
      codes: uint8, the bits of the float8_e4m3fn `numbers`, of the weight's shape. As floats, XLA on CPUs would have
        all of a stack wider before a scan takes a layer of it.
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

    @property
    def numbers(self) -> Array:
        """The codes as floats."""
        return lax.bitcast_convert_type(self.codes, DTYPE)

    def dense(self) -> Array:
        return (self.numbers.astype(jnp.float32) * self.scale).astype(self.dtype)

    def rows(self, at: Array) -> Array:
        scale = self.scale if self.scale.shape[0] == 1 else self.scale[at]
        return dataclasses.replace(self, codes=self.codes[at], scale=scale).dense()


def float8(weight: Any, axis: int | Sequence[int] = 0, depth: int = 0) -> Float8:
    """Round a weight to 8-bit floats; each out channel is scaled so that its largest magnitude is theirs, 448.

    Arguments are those of `int8`.

    >>> w = float8(jnp.array([[448.0, 3.0], [-200.0, 1.0]]))
    >>> w.numbers.astype("float32").tolist(), [round(scale * 448, 3) for scale in w.scale[0].tolist()]
    ([[448.0, 448.0], [-192.0, 144.0]], [448.0, 3.0])
    """
    return _float8(jnp.asarray(weight), in_axes(axis, depth, jnp.ndim(weight)), depth)


def _float8_of(weight: Array, axes: tuple[int, ...], depth: int) -> Float8:
    wide = weight.astype(jnp.float32)
    most = jnp.abs(wide).max(axes, keepdims=True)
    limit = float(jnp.finfo(DTYPE).max)
    scale = jnp.maximum(divided(jnp.where(most > 0, most, 1), limit), TINY)
    codes = jnp.clip(wide / scale, -limit, limit).astype(DTYPE)  # or a quotient may be rounded to what is no number
    return Float8(lax.bitcast_convert_type(codes, jnp.uint8), scale, jnp.dtype(weight.dtype), weight.ndim - depth)


_float8 = jax.jit(_float8_of, static_argnums=(1, 2))
