"""Rotary embedding, and the ways in which it is stretched over more positions than a model was first trained on.

Every way divides frequencies. Most do so once and for all; two look at how many positions a row has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Describe how rotary embedding is stretched.

    `divisors` has what each of the head_dim / 2 frequencies is divided by, and cosines and sines are multiplied by
    `amplitude`. What happens in rows of more than `original_max_len` positions is one of two: with `long_divisors` they
    take these in place of `divisors`, with `growth` their base grows by it (`dynamic`).

    A row's length is that of its own segment or text, whatever lies beside it in a batch. Keys in a cache stay as they
    were turned when they came in, as in Hugging Face's transformers.

    Raises:
      ValueError: the numbers make no sense.
    """

    divisors: tuple[float, ...]
    amplitude: float = 1.0
    original_max_len: int | None = None
    long_divisors: tuple[float, ...] | None = None
    growth: float | None = None

    def __post_init__(self) -> None:
        numbers = (*self.divisors, *(self.long_divisors or ()), self.amplitude, self.growth or 1.0)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"{_shown(self)} needs finite numbers above 0")
        if self.long_divisors is not None and len(self.long_divisors) != len(self.divisors):
            raise ValueError(f"{_shown(self)} has {len(self.long_divisors)} long_divisors: one for each is needed")
        by_length = self.long_divisors is not None or self.growth is not None
        if by_length != (self.original_max_len is not None) or (self.original_max_len or 1) < 1:
            raise ValueError(
                f"{_shown(self)} needs original_max_len where rows of more positions differ, and only there"
            )


def linear(head_dim: int, factor: float) -> RopeScaling:
    """Divide all frequencies alike: position interpolation (arXiv 2306.15595).

    >>> linear(head_dim=4, factor=8.0).divisors
    (8.0, 8.0)
    """
    return RopeScaling(divisors=(float(factor),) * (head_dim // 2))


def llama3(
    head_dim: int,
    base: float,
    factor: float,
    *,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_len: int,
) -> RopeScaling:
    """Stretch as Llama 3.1 does (arXiv 2407.21783).

    Frequencies that turn fewer than `low_freq_factor` times in `original_max_len` positions are divided by `factor`,
    those that turn more than `high_freq_factor` times are kept, and those between are mixed.

    Raises:
      ValueError: `low_freq_factor` is not below `high_freq_factor`.

    >>> rope = llama3(4, 100.0, 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=32)
    >>> [round(number, 3) for number in rope.divisors]
    [1.0, 8.0]
    """
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            f"low_freq_factor={low_freq_factor!r}, high_freq_factor={high_freq_factor!r}: the first is to be less"
        )
    turns = original_max_len * _frequencies(head_dim, base) / (2 * np.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return RopeScaling(divisors=_tuple(1 / (kept + (1 - kept) / factor)))


def yarn(
    head_dim: int,
    base: float,
    factor: float,
    *,
    original_max_len: int,
    amplitude: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    whole: bool = True,
) -> RopeScaling:
    """Stretch by YaRN (arXiv 2309.00071): slow frequencies are divided by `factor`, fast ones kept, others mixed.

    Fast are those that turn `beta_fast` times in `original_max_len` positions. The ends of the mixture are `whole`
    coordinates, or what lies between them. `amplitude` is 0.1 log(factor) + 1 (eq. 22).

    >>> [round(number, 3) for number in yarn(4, 100.0, 8.0, original_max_len=8).divisors]
    [1.0, 8.0]
    """

    def coordinate(turns: float) -> float:
        return head_dim * math.log(original_max_len / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = coordinate(beta_fast), coordinate(beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if whole else (low, high)
    low, high = max(low, 0), min(high, head_dim - 1)
    divided = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    amplitude = yarn_amplitude(factor) if amplitude is None else amplitude
    return RopeScaling(divisors=_tuple(1 / (1 - divided + divided / factor)), amplitude=amplitude)


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """Return what YaRN multiplies cosines and sines by (arXiv 2309.00071, eq. 22, with DeepSeek's `weight`).

    >>> yarn_amplitude(1.0), round(yarn_amplitude(4.0), 4)
    (1.0, 1.1386)
    """
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope(
    short: Sequence[float],
    long: Sequence[float],
    factor: float,
    *,
    original_max_len: int,
    amplitude: float | None = None,
) -> RopeScaling:
    """Stretch by LongRoPE (arXiv 2402.13753): by `short` up to `original_max_len` positions, by `long` beyond.

    `amplitude` is sqrt(1 + log(factor) / log(original_max_len)), and 1 where `factor` is 1 or less.

    >>> longrope([1.0, 1.5], [2.0, 6.0], 1.0, original_max_len=64).amplitude
    1.0
    """
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_len))
    if _tuple(short) == _tuple(long):  # equal configurations of what is equal
        return RopeScaling(divisors=_tuple(short), amplitude=amplitude)
    return RopeScaling(
        divisors=_tuple(short), long_divisors=_tuple(long), original_max_len=original_max_len, amplitude=amplitude
    )


def dynamic(head_dim: int, factor: float, original_max_len: int) -> RopeScaling:
    """Let the base grow with a row's length L beyond `original_max_len` M: dynamic NTK, as transformers has it.

    The base is multiplied by (factor L / M - factor + 1) ** (head_dim / (head_dim - 2)).

    Raises:
      ValueError: `head_dim` is not above 2.

    >>> rope = dynamic(head_dim=4, factor=2.0, original_max_len=8)
    >>> cos, _ = rotary(jnp.arange(9)[None], 4, 10000.0, rope)
    >>> bool((cos[:, :8] == rotary(jnp.arange(8)[None], 4, 10000.0)[0]).all())
    False
    """
    if head_dim <= 2:
        raise ValueError(f"head_dim={head_dim} is too small for a base that grows: it needs more than 2")
    return RopeScaling(divisors=(1.0,) * (head_dim // 2), original_max_len=original_max_len, growth=float(factor))


def rotary(
    positions_BxT: Array,
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    segments_BxT: Array | None = None,
) -> tuple[Array, Array]:
    """Give the cosines and sines of rotary embedding (RoFormer, arXiv 2104.09864, eq. 15).

    `positions_BxT` is int; both results are float32 of shape (B, T, head_dim / 2).

    >>> cos, sin = rotary(jnp.zeros((1, 3), jnp.int32), head_dim=8, base=10000.0)
    >>> cos.shape, float(cos.min()), float(sin.max())
    ((1, 3, 4), 1.0, 0.0)
    """
    powers = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    if scaling is None:
        frequencies = base**-powers
    elif scaling.original_max_len is None:
        frequencies = base**-powers / jnp.array(scaling.divisors, jnp.float32)
    else:
        frequencies = _by_length(scaling, base, powers, _lengths(positions_BxT, segments_BxT)[..., None])
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scaling is None else (cos * scaling.amplitude, sin * scaling.amplitude)


def rotate(x_BxTxNxH: Array, cos: Array, sin: Array) -> Array:
    """Turn every head by its position, pairing coordinate i with i + H/2 as Hugging Face stores weights.

    `cos` and `sin` come from `rotary`. Same shape and dtype as the input; computed in float32.

    >>> x = jnp.ones((1, 2, 3, 8), jnp.bfloat16)
    >>> y = rotate(x, *rotary(jnp.array([[0, 1]]), head_dim=8, base=10000.0))
    >>> y.dtype, bool((y[:, 0] == x[:, 0]).all())
    (dtype(bfloat16), True)
    """
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BxTxNxH.dtype)


def _by_length(scaling: RopeScaling, base: float, powers: Array, lengths: Array) -> Array:
    """Give the frequencies of rows of these lengths (..., 1)."""
    assert scaling.original_max_len is not None
    most = scaling.original_max_len
    if scaling.growth is not None:
        head_dim = 2 * len(scaling.divisors)
        grown = scaling.growth * jnp.maximum(lengths, most) / most - (scaling.growth - 1)
        return (base * grown ** (head_dim / (head_dim - 2))) ** -powers
    short, long = (jnp.array(of, jnp.float32) for of in (scaling.divisors, scaling.long_divisors))
    return base**-powers / jnp.where(lengths > most, long, short)


def _lengths(positions_BxT: Array, segments_BxT: Array | None) -> Array:
    """Give how many positions there are: in each row (B, 1), or in each token's own segment (B, T)."""
    if segments_BxT is None:
        return positions_BxT.max(axis=1, keepdims=True) + 1
    same_BxTxT = segments_BxT[:, :, None] == segments_BxT[:, None, :]
    return jnp.where(same_BxTxT, positions_BxT[:, None, :], -1).max(axis=2) + 1


def _frequencies(head_dim: int, base: float) -> np.ndarray:
    return float(base) ** (-np.arange(0, head_dim, 2) / head_dim)


def _tuple(numbers: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(number) for number in numbers)


def _shown(scaling: RopeScaling) -> str:
    text = repr(scaling)
    return text if len(text) <= 60 else text[:57] + "..."
