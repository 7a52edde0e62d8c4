"""Arrays of float32 held in 16 or 8 bits, rounded at random to one of the two numbers between which each lies.

Rounding to the nearest would stop a slow average: with b2 = 0.999 a moment moves by a thousandth of itself in a step,
and a bfloat16 has no number within a 512th of another, so it would never move again. At random, with the chance that
makes the mean the number itself, it moves as it would in float32, with noise (arXiv 2010.06192).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

# A block of 8 bits: how many numbers share what its codes mean, how many numbers an array has at least, and how far,
# in powers of two, numbers with and without signs go below the largest of their block.
_BLOCKS, _LEAST_SIZE = range(32, 257), 4096
_SIGNED, _UNSIGNED = 12, 32
_NORMAL, _INFINITE = 0x00800000, 0x7F800000  # the bits of the smallest normal float32, and of infinity


class Bfloat16(NamedTuple):
    """Hold numbers as bfloat16."""

    values: Array

    def whole(self) -> Array:
        """Return the numbers as float32."""
        return self.values.astype(jnp.float32)


class EightBits(NamedTuple):
    """Hold numbers by the logarithms of their magnitudes, which in each block go by equal steps between two ends.

    The bits of a float32 are, as a whole number, its logarithm but for a part that is piecewise linear; so code n > 0
    is the number of the bits `least + (n - 1) * |step|`, and 0 is 0. A block with a negative number has a negative
    step, 7 bits and the sign in the eighth. Magnitudes are cut at 2^-12 of the block's largest, or 2^-32 without signs.
    """

    codes: Array  # uint8, of the numbers' shape
    least: Array  # int32, of that shape but for one axis, which has a number for each block
    step: Array  # int32, likewise

    def whole(self) -> Array:
        """Return the numbers as float32."""
        axis, block = next(
            ((n, a // b) for n, (a, b) in enumerate(zip(self.codes.shape, self.least.shape, strict=True)) if a != b)
        )
        least, step = (jnp.expand_dims(of, axis + 1) for of in (self.least, self.step))
        codes = _in_blocks(self.codes, axis, block).astype(jnp.int32)
        level = jnp.where(step < 0, codes & 127, codes)
        found = jnp.where(level == 0, 0.0, _number(least + (level - 1) * jnp.abs(step)))
        return jnp.where((step < 0) & (codes > 127), -found, found).reshape(self.codes.shape)


Rounded = Bfloat16 | EightBits


def rounded(numbers: Array, form: str, seed: Array) -> Rounded | None:
    """Round an array, by noise of a seed; the mean over all seeds is the array itself.

    Args:
      numbers: float32, of one axis or more.
      form: "bfloat16" or "int8".
      seed: uint32; every array and step is to have its own.

    Returns:
      The array in that form. None where 8 bits would save little: of less than 4,096 numbers, or where no axis is made
      of equal blocks of 32 to 256. Of numbers without signs those below 2^-32 of their block's largest are rounded up,
      so that no divisor becomes 0.

    >>> import jax
    >>> x = jnp.full((64, 64), 1.003)
    >>> mean = rounded(x, "bfloat16", jnp.uint32(7)).whole().mean()
    >>> bool(abs(mean - 1.003) < 2e-4), float(x[0, 0].astype("bfloat16"))
    (True, 1.0)
    """
    if form == "bfloat16":
        return Bfloat16(_as_bfloat16(numbers, _noise(numbers.shape, seed)))
    where = _blocks(numbers.shape)
    if where is None:
        return None
    axis, block = where
    if numbers.ndim < 3 or axis == 0:
        return _as_eight_bits(numbers, axis, block, _noise(numbers.shape, seed))

    def one(numbered: tuple[Array, Array]) -> EightBits:
        number, matrix = numbered
        return _as_eight_bits(matrix, axis - 1, block, _noise(matrix.shape, mixed(seed + number)))

    # XLA on CPUs holds what this makes of all arrays at once, some ten times their size: of a stack, of one matrix.
    return lax.map(one, (jnp.arange(len(numbers), dtype=jnp.uint32), numbers))


def _as_bfloat16(numbers: Array, noise: Array) -> Array:
    # Its bits are the first half of a float32's: a random second half is added, and what comes of it cut off.
    bits = lax.bitcast_convert_type(numbers, jnp.uint32) + (noise & 0xFFFF)
    cut = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(numbers), cut, numbers).astype(jnp.bfloat16)


def _as_eight_bits(numbers: Array, axis: int, block: int, noise: Array) -> EightBits:
    x, noise = _in_blocks(numbers, axis, block), _in_blocks(noise, axis, block)
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    bits = jnp.where(bits < _NORMAL, 0, bits)  # which some devices take for 0
    top = bits.max(axis + 1, keepdims=True)
    signed = (x < 0).any(axis + 1, keepdims=True)
    lowest = jnp.where(bits == 0, top, bits).min(axis + 1, keepdims=True)
    least = jnp.maximum(lowest, top - (jnp.where(signed, _SIGNED, _UNSIGNED) << 23))
    least = jnp.where(top < _INFINITE, jnp.maximum(least, _NORMAL), top)  # what is no number stays none
    step = jnp.maximum(-((least - top) // jnp.where(signed, 126, 254)), 1)
    below = jnp.maximum(jnp.floor((bits - least).astype(jnp.float32) / step), 0).astype(jnp.int32)
    lower, upper = (_number(least + n * step) for n in (below, below + 1))
    part = (_number(bits) - lower) / (upper - lower)
    chance = (noise >> 8).astype(jnp.float32) / (1 << 24)
    level = below + 1 + (chance < part)
    under = jnp.where(signed, chance * _number(least) < _number(bits), True)
    level = jnp.where(bits < least, under, level) * (bits > 0)
    codes = jnp.where(x < 0, level + 128, level).astype(jnp.uint8).reshape(numbers.shape)
    return EightBits(codes, least.squeeze(axis + 1), jnp.where(signed, -step, step).squeeze(axis + 1))


def _number(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _blocks(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the last axis that is made of equal blocks, and the largest size of these; None where none is.

    >>> _blocks((30, 576, 32)), _blocks((48, 1536)), _blocks((576, 9)), _blocks((4096,)), _blocks((30, 100))
    ((2, 32), (1, 256), (0, 192), (0, 256), None)
    """
    sizes = {axis: next((block for block in reversed(_BLOCKS) if n % block == 0), None) for axis, n in enumerate(shape)}
    found = [(axis, block) for axis, block in sizes.items() if block]
    return found[-1] if found and math.prod(shape) >= _LEAST_SIZE else None


def _in_blocks(array: Array, axis: int, block: int) -> Array:
    """Split an axis into blocks and their numbers.

    >>> _in_blocks(jnp.zeros((3, 64, 5)), 1, 32).shape
    (3, 2, 32, 5)
    """
    return array.reshape(*array.shape[:axis], -1, block, *array.shape[axis + 1 :])


def _noise(shape: tuple[int, ...], seed: Any) -> Array:
    """Return uint32 numbers as if at random, each of its place and the seed alone.

    A hash takes a quarter of the time of `jax.random.bits` on CPUs, and each device makes those of its own part.
    """
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        places += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return mixed(places * jnp.uint32(0x9E3779B1) + seed)


def mixed(x: Array) -> Array:
    """Return a hash of uint32 numbers, each of its own: shifts and odd factors, so that no two have the same."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
