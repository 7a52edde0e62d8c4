"""Weights as GGUF files hold them: blocks of 32 or 256 numbers along the in-axis, bytes as they stand in the file.

The layouts are those of `ggml-quants.c` and `ggml-common.h` in https://github.com/ggml-org/ggml.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.stored.exact import added
from rslora_jax.stored.form import Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gguf(Stored):
    """A matrix in blocks of a GGUF file.

    Attributes:
      data: uint8, the bytes; of the weight's shape (*stack, *inner), with its `axis` as long as a row of blocks has
        bytes, or as the longest row has, where the elements of the stack are of several kinds.
      which: of several kinds that of each element of the stack, int32 (*stack,), a place in `kinds`; else None.
      inner, dtype: shape behind the stack and dtype of the weight.
      axis: the axis of `inner` along which blocks lie.
      kinds: the names of the kinds, of `KINDS`.
    """

    data: Array
    which: Array | None
    inner: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return tuple(self.data.shape[: self.data.ndim - len(self.inner)])

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        size = KINDS[self.kinds[0]].bytes if len(self.kinds) == 1 else self.data.shape[len(self.stack) + self.axis]
        return {"data": tuple(size if n == self.axis else 1 for n in range(len(self.inner)))}

    @property
    def format(self) -> str:
        return "+".join(self.kinds)

    def dense(self) -> Array:
        if self.which is None:
            return _dense_of(KINDS[self.kinds[0]], self.data, len(self.stack) + self.axis).astype(self.dtype)
        if self.stack:  # one after the other: not all of them in all kinds
            flat = (self.data.reshape(-1, *self.data.shape[len(self.stack) :]), self.which.reshape(-1))
            each = lax.map(lambda one: dataclasses.replace(self, data=one[0], which=one[1]).dense(), flat)
            return each.reshape(self.shape)

        def branch(name: str) -> Callable[[Array], Array]:
            kind = KINDS[name]
            length = self.inner[self.axis] // kind.block * kind.bytes
            return lambda data: _dense_of(kind, lax.slice_in_dim(data, 0, length, axis=self.axis), self.axis)

        return lax.switch(self.which, [branch(name) for name in self.kinds], self.data).astype(self.dtype)

    def rows(self, at: Array) -> Array | None:
        if self.which is not None or self.axis == 0:
            return None
        return dataclasses.replace(self, data=self.data[at], inner=(*at.shape, *self.inner[1:])).dense()


def _dense_of(kind: "Kind", data: Array, axis: int) -> Array:
    """Return the numbers of rows of blocks that lie along an axis, in float32."""
    blocked = data.reshape(*data.shape[:axis], -1, kind.bytes, *data.shape[axis + 1 :])
    # Blocks are taken apart along the first axis of what is behind them, so that all else is done for whole rows.
    found = kind.numbers(_Bytes(blocked, axis + 1))
    return found.reshape(*data.shape[:axis], -1, *data.shape[axis + 1 :])


class _Bytes(NamedTuple):
    """Bytes of blocks, (..., bytes, ...), along an axis."""

    data: Array
    axis: int

    def of(self, start: int, stop: int) -> Array:
        """Return some of them."""
        return lax.slice_in_dim(self.data, start, stop, axis=self.axis)

    def half(self, start: int) -> Array:
        """Return the float16 of two of them, in float32, along an axis of size 1."""
        low, high = (self.of(start + n, start + n + 1).astype(jnp.uint16) for n in (0, 1))
        return lax.bitcast_convert_type(low | high << 8, jnp.float16).astype(jnp.float32)

    def signed(self, start: int, stop: int) -> Array:
        """Return some of them as signed integers."""
        return lax.bitcast_convert_type(self.of(start, stop), jnp.int8)

    def parts(self, start: int, stop: int, bits: int, group: int | None = None) -> Array:
        """Return the numbers of some bits that each byte holds: of the lowest bits for all bytes, then of the next.

        With `group` so many bytes at a time: the numbers of one group come before those of the next.
        """
        count = 8 // bits
        group = group or stop - start
        data = self.of(start, stop)
        shape, at = data.shape, self.axis
        data = data.reshape(*shape[:at], -1, 1, group, *shape[at + 1 :])
        shift = jnp.arange(count, dtype=jnp.uint8) * jnp.uint8(bits)
        found = data >> shift.reshape(-1, *(1,) * (data.ndim - at - 2)) & ((1 << bits) - 1)
        return found.reshape(*shape[:at], -1, *shape[at + 1 :])

    def spread(self, array: Array, times: int) -> Array:
        """Repeat each place along the axis."""
        return jnp.repeat(array, times, self.axis)


def _wide(integers: Array) -> Array:
    return integers.astype(jnp.float32)


def _q4_0(block: _Bytes) -> Array:
    return (_wide(block.parts(2, 18, 4)) - 8) * block.half(0)


def _q4_1(block: _Bytes) -> Array:
    return added(_wide(block.parts(4, 20, 4)) * block.half(0), block.half(2))


def _fifth_bits(block: _Bytes, start: int) -> Array:
    """Return the 32 bits of four bytes, one by one: bit n of byte m is number 8 m + n."""
    return block.parts(start, start + 4, 1, group=1) << 4


def _q5_0(block: _Bytes) -> Array:
    return (_wide(block.parts(6, 22, 4) | _fifth_bits(block, 2)) - 16) * block.half(0)


def _q5_1(block: _Bytes) -> Array:
    return added(_wide(block.parts(8, 24, 4) | _fifth_bits(block, 4)) * block.half(0), block.half(2))


def _q8_0(block: _Bytes) -> Array:
    return _wide(block.signed(2, 34)) * block.half(0)


def _q4_k(block: _Bytes) -> Array:
    # Eight scales and eight minima of 6 bits in 12 bytes: the first four whole, the others in parts.
    low, high, both = block.of(4, 8), block.of(8, 12), block.of(12, 16)
    scales = jnp.concatenate([low & 63, (both & 15) | (low >> 6) << 4], block.axis)
    minima = jnp.concatenate([high & 63, (both >> 4) | (high >> 6) << 4], block.axis)
    scales, minima = _wide(scales) * block.half(0), _wide(minima) * block.half(2)
    codes = _wide(block.parts(16, 144, 4, group=32))
    return added(codes * block.spread(scales, 32), -block.spread(minima, 32))


def _q6_k(block: _Bytes) -> Array:
    codes = block.parts(0, 128, 4, group=64) | block.parts(128, 192, 2, group=32) << 4
    scales = _wide(block.signed(192, 208)) * block.half(208)
    return (_wide(codes) - 32) * block.spread(scales, 16)


class Kind(NamedTuple):
    """A kind of block: how many numbers and bytes it has, and what makes the numbers of the bytes."""

    block: int
    bytes: int
    numbers: Callable[[_Bytes], Array]


KINDS = {
    "Q4_0": Kind(32, 18, _q4_0),
    "Q4_1": Kind(32, 20, _q4_1),
    "Q5_0": Kind(32, 22, _q5_0),
    "Q5_1": Kind(32, 24, _q5_1),
    "Q8_0": Kind(32, 34, _q8_0),
    "Q4_K": Kind(256, 144, _q4_k),
    "Q6_K": Kind(256, 210, _q6_k),
}


def gguf(rows: Any, kind: str, dtype: Any = jnp.float32, *, is_turned: bool = False) -> Gguf:
    """Take the rows of a file's matrix.

    Args:
      rows: uint8 (out, bytes).
      kind: of `KINDS`.
      dtype: the weight's.
      is_turned: make a weight (in, out), as a kernel is, in place of (out, in).

    Raises:
      ValueError: the kind is not known, or the bytes are no whole number of its blocks.

    >>> w = gguf(jnp.zeros((16, 40), jnp.uint8), "Q4_1", is_turned=True)
    >>> w.shape, w.nbytes, w.format
    ((64, 16), 640, 'Q4_1')
    """
    if kind not in KINDS:
        raise ValueError(f"blocks of {kind} are not known: {', '.join(KINDS)} are")
    block, size, _ = KINDS[kind]
    count, length = rows.shape
    if length % size:
        raise ValueError(f"a row of {length} bytes is no whole number of blocks of {kind}, which have {size}")
    numbers = length // size * block
    inner, axis = ((numbers, count), 0) if is_turned else ((count, numbers), 1)
    data = jnp.asarray(rows.T if is_turned else rows)
    return Gguf(data, None, inner, jnp.dtype(dtype), axis, (kind,))
