"""Weights in 4 bits, as QLoRA has them (arXiv 2305.14314, section 3) and `bitsandbytes` stores them.

Each block of 64 numbers has its largest magnitude, and each number the nearest of sixteen levels times that. With
double quantisation the magnitudes are stored in 8 bits themselves, less their mean, 256 of them in a block. Codes,
scales and the numbers that they stand for are those of `bitsandbytes` on CPUs, to the last bit; the mean is to
float32's rounding, since the order in which PyTorch sums depends on the machine.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rslora_jax.stored.exact import TINY, added, mean
from rslora_jax.stored.form import Stored

BLOCK, NESTED_BLOCK = 64, 256
# Quantiles of a normal distribution, and zero (arXiv 2305.14314, appendix E).
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _dynamic_levels() -> np.ndarray:
    """Return the 256 levels of a signed 8-bit number with a dynamic exponent (arXiv 1511.04561; 2110.02861)."""
    found = [0.0, 1.0]
    for exponent in range(7):
        n, (low, high) = 2**exponent, np.array([0.1, 1], np.float32).astype(np.float64)
        step = np.float64(np.float32((high - low) / np.float32(n)))
        # From either end, each rounded once, as torch.linspace has them.
        ends = np.array(
            [low + step * k if k < (n + 1) // 2 else high - step * (n - k) for k in range(n + 1)], np.float32
        )
        means = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        found += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(found, np.float32))


NESTED_LEVELS = _dynamic_levels()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Stored):
    """A weight in 4 bits, with blocks along one of its axes, or through all of it.

    Attributes:
      codes: uint8, two levels in each, the first in the high half. Of the weight's shape (*stack, *inner), with its
        `axis` half as long; or (*stack, n), where blocks go through all of it.
      absmax: the largest magnitude of each block, float32, or uint8 where it is stored in 8 bits; of the weight's
        shape, with its `axis` as long as it has blocks, or (*stack, blocks).
      nested: of magnitudes in 8 bits the largest of each of their blocks, (*stack, blocks), float32, else None. These
        blocks go through all of an element of the stack, its `axis` last.
      offset: of magnitudes in 8 bits their mean, (*stack,), float32, else None.
      inner, dtype: shape behind the stack and dtype of the weight.
      axis: the axis of `inner` along which blocks lie; of a weight that the library has as (out, in), the in-axis.
      is_flat: whether blocks go through all of it, its `axis` last, as where the axis is not a whole number of blocks.
      block: how many numbers are in one.
      levels: the sixteen.
    """

    codes: Array
    absmax: Array
    nested: Array | None
    offset: Array | None
    inner: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    is_flat: bool = dataclasses.field(default=False, metadata={"static": True})
    block: int = dataclasses.field(default=BLOCK, metadata={"static": True})
    levels: tuple[float, ...] = dataclasses.field(default=LEVELS, metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return tuple(self.codes.shape[: self.codes.ndim - (1 if self.is_flat else len(self.inner))])

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        if self.is_flat:
            return {}
        codes = tuple(self.block // 2 if n == self.axis else 1 for n in range(len(self.inner)))
        return {"codes": codes, "absmax": (1,) * len(self.inner)}

    @property
    def format(self) -> str:
        name = "NF4" if self.levels == LEVELS else "FP4"
        return name if self.block == BLOCK else f"{name} in blocks of {self.block}"

    def dense(self) -> Array:
        at = len(self.stack) + (0 if self.is_flat else self.axis)
        shape = self.codes.shape
        # Block by block: of an axis as a whole XLA writes a TPU's program out line by line, minutes of compiling.
        halves = self.codes.reshape(*shape[:at], -1, self.block // 2, *shape[at + 1 :])
        blocked = _of_levels(_taken_apart(halves, at + 1), self.levels)
        scales = lax.optimization_barrier(self._scales())  # or each number would look up its own
        array = (blocked * jnp.expand_dims(scales, at + 1)).astype(self.dtype)
        if not self.is_flat:
            return array.reshape(self.shape)
        others = [n for m, n in enumerate(self.inner) if m != self.axis]
        flat = array.reshape(*self.stack, -1)[..., : math.prod(self.inner)]
        return jnp.moveaxis(flat.reshape(*self.stack, *others, self.inner[self.axis]), -1, len(self.stack) + self.axis)

    def rows(self, at: Array) -> Array | None:
        if self.is_flat or not 0 < self.axis == len(self.inner) - 1:
            return None
        absmax = self.absmax[at]
        if self.nested is not None and self.offset is not None:
            numbers = jnp.arange(math.prod(self.absmax.shape[1:])).reshape(self.absmax.shape[1:])
            each = self.nested[(at.reshape(-1, *(1,) * numbers.ndim) * numbers.size + numbers) // NESTED_BLOCK]
            absmax = added(_nested_level(absmax) * each, self.offset)
        inner = (*at.shape, *self.inner[1:])
        return dataclasses.replace(
            self, codes=self.codes[at], absmax=absmax, nested=None, offset=None, inner=inner
        ).dense()

    def _scales(self) -> Array:
        """Return the magnitudes in float32."""
        if self.nested is None or self.offset is None:
            return self.absmax
        depth = len(self.stack)
        shape = self.absmax.shape[depth:]
        in_order = shape if self.is_flat else (*np.delete(shape, self.axis), shape[self.axis])
        each = jnp.broadcast_to(self.nested[..., None], (*self.nested.shape, NESTED_BLOCK))
        each = each.reshape(*self.stack, -1)[..., : math.prod(shape)].reshape(*self.stack, *in_order)
        each = each if self.is_flat else jnp.moveaxis(each, -1, depth + self.axis)
        return added(_nested_level(self.absmax) * each, self.offset.reshape(*self.stack, *(1,) * len(shape)))


def nf4(weight: Any, axis: int = 0, depth: int = 0, *, block: int = BLOCK, double: bool = True) -> NF4:
    """Round a weight to 4 bits.

    Args:
      weight: an array (*stack, *inner) of numbers that are finite.
      axis: the axis of `inner` along which blocks lie: of a kernel (in, out) 0, of a matrix (out, in) or a table 1.
      depth: how many axes the stack has; each of its elements is rounded for itself.
      block: how many numbers are in one. Where the axis is no whole number of them, blocks go through the weight as
        a whole, its axis last, and the last is filled up.
      double: store the magnitudes in 8 bits.

    >>> import jax
    >>> w = nf4(jax.random.normal(jax.random.key(0), (128, 16)))
    >>> w.shape, w.nbytes, bool(jnp.abs(w.dense()).max() > 1)
    ((128, 16), 1064, True)
    """
    single = _nf4(jnp.asarray(weight), axis % (np.ndim(weight) - depth), depth, block)
    return doubled(single) if double else single


def _nf4_of(weight: Array, axis: int, depth: int, block: int) -> NF4:
    stack, inner = weight.shape[:depth], weight.shape[depth:]
    is_flat = bool(inner[axis] % block)
    last = jnp.moveaxis(weight, depth + axis, -1).astype(jnp.float32)
    flat = last.reshape(*stack, -1)
    flat = jnp.pad(flat, [(0, 0)] * depth + [(0, -flat.shape[-1] % block)])
    blocked = flat.reshape(*stack, -1, block)
    absmax = jnp.abs(blocked).max(-1)
    scaled = blocked * (1 / jnp.maximum(absmax, TINY))[..., None]
    if math.prod(inner) % block:  # bitsandbytes divides by the last
        scaled = scaled.at[..., -1, :].set(blocked[..., -1, :] / jnp.maximum(absmax[..., -1:], TINY))
    codes = _nearest(scaled, LEVELS).reshape(*stack, -1, 2)
    codes = codes[..., 0] << 4 | codes[..., 1]
    if not is_flat:
        rows = last.shape[depth:-1]
        codes, absmax = (jnp.moveaxis(array.reshape(*stack, *rows, -1), -1, depth + axis) for array in (codes, absmax))
    return NF4(codes, absmax, None, None, inner, jnp.dtype(weight.dtype), axis, is_flat, block)


_nf4 = jax.jit(_nf4_of, static_argnums=(1, 2, 3))


@jax.jit
def doubled(weight: NF4) -> NF4:
    """Store the magnitudes of a weight in 8 bits, those of each element of its stack for themselves."""
    stack, at = weight.stack, len(weight.stack) + weight.axis
    in_order = weight.absmax if weight.is_flat else jnp.moveaxis(weight.absmax, at, -1)
    offset = mean(in_order.reshape(*stack, -1))
    absmax, nested = _eight_bits(in_order.reshape(*stack, -1) - offset[..., None])
    if not weight.is_flat:
        absmax = jnp.moveaxis(absmax.reshape(in_order.shape), -1, at)
    return dataclasses.replace(weight, absmax=absmax, nested=nested, offset=offset)


def _nested_level(codes: Array) -> Array:
    return jnp.asarray(NESTED_LEVELS).at[codes].get(mode="promise_in_bounds")


def _eight_bits(numbers: Array) -> tuple[Array, Array]:
    """Round (*stack, n) numbers to 8 bits in blocks of 256; return them and the largest magnitude of each block."""
    n = numbers.shape[-1]
    padded = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -n % NESTED_BLOCK)])
    blocked = padded.reshape(*numbers.shape[:-1], -1, NESTED_BLOCK)
    most = jnp.abs(blocked).max(-1)
    scaled = jnp.clip(blocked * (1 / jnp.maximum(most, TINY))[..., None], -1, 1)
    codes = jnp.asarray(_nested_codes())[((scaled + 1) * 0.5 * 65535 + 0.5).astype(jnp.int32)]
    codes = jnp.where(most[..., None] > 0, codes, 0)
    return codes.reshape(padded.shape)[..., :n], most


@functools.cache
def _nested_codes() -> np.ndarray:
    """Return the level of each of 65,536 numbers from -1 to 1, by which the library rounds on CPUs."""
    grid = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    middles = (NESTED_LEVELS[1:] + NESTED_LEVELS[:-1]) / np.float32(2)
    return np.searchsorted(middles, grid).astype(np.uint8)


def _nearest(numbers: Array, levels: tuple[float, ...]) -> Array:
    """Return the number of the nearest level, the lower of two that are as near."""
    values = np.array(levels, np.float32)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    return functools.reduce(jnp.add, [(numbers > middle).astype(jnp.uint8) for middle in middles])


def _of_levels(codes: Array, levels: tuple[float, ...]) -> Array:
    """Return the level of each code, by choices: most devices look numbers up one by one."""
    # The levels hang on a code: JAX would take constants out of a scan, each as an array of the codes' size.
    nothing = (codes.reshape(-1)[0] & 0).astype(jnp.float32)
    found = [level + nothing for level in np.array(levels, np.float32)]
    bit = 0
    while len(found) > 1:
        is_odd = (codes >> bit & 1).astype(bool)
        found = [jnp.where(is_odd, odd, even) for even, odd in zip(found[::2], found[1::2], strict=True)]
        bit += 1
    return found[0]


def _taken_apart(codes: Array, axis: int) -> Array:
    """Return the two codes of each byte next to each other along an axis.

    Each half is spread out and put between those of the other: an axis of size two, of which a TPU makes 32, would be
    moved through memory (4,096 x 4,096 compiled ahead of time for a v5e: 1.6 million cycles, and so 0.1). Along the
    last axis that takes a CPU twice as long.
    """
    if axis == codes.ndim - 1:
        return jnp.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)

    def spread(half: Array, before: int) -> Array:
        padding = [(before, 1 - before, 1) if n == axis else (0, 0, 0) for n in range(codes.ndim)]
        return lax.pad(half, jnp.zeros((), codes.dtype), padding)

    return spread(codes >> 4, 0) | spread(codes & 15, 1)
