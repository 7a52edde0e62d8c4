"""A weight view: a base weight on its way to its use, with its two factors carried along.

Renaming a weight (transposing, reshaping, slicing it) commutes with adding A B to it as long as the
axes that A spans and those that B spans stay apart. So a view holds the weight and both factors, and
every renaming acts on all three.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

RANK = "Z"  # the rank's letter in every einsum of the transform
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A base weight `w` that stands for `w + sum over the rank of a * b`.

    The factors are aligned with `w`: they have its axes, at full size where they span them and at size
    1 where they do not, and then the rank. A stack axis is spanned by both.

    Attributes:
      w: the base weight, in the layout it has at this point of the program.
      a: the factor A, aligned; None while sites are being discovered.
      b: gamma times the factor B, aligned; None while sites are being discovered.
      axes: for each axis of `w`, the axes of the stored parameter that it is made of.
      dtype: what the program has cast the weight to. `w` keeps its stored dtype, so that a sum with
        the factors can be formed before it is rounded.
      site: the parameter's path.
    """

    w: Array
    a: Any  # Array, or None
    b: Any
    axes: tuple[frozenset[int], ...] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    site: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def stacked(self) -> bool:
        """Whether the leading axis is a stack: both factors span it (or there are none yet)."""
        return all(f is None or spans(self, f)[0] for f in (self.a, self.b))

    @property
    def base(self) -> Array:
        """The weight without its adapter, as the unadapted program sees it."""
        return self.w.astype(self.dtype)


def spans(view: View, factor: Array) -> tuple[bool, ...]:
    """Say for each axis of the weight whether a factor spans it."""
    return tuple(n == m for n, m in zip(view.w.shape, factor.shape, strict=False))


def compact(view: View, factor: Array, letters: str) -> tuple[str, Array]:
    """Drop the axes a factor does not span; return its einsum subscripts and the array."""
    spanned = spans(view, factor)
    gone = [n for n, s in enumerate(spanned) if not s]
    return "".join(c for c, s in zip(letters, spanned, strict=True) if s) + RANK, jnp.squeeze(factor, gone)


def update(view: View) -> Array:
    """Return gamma A B in the layout of the weight and the dtype of the factors."""
    letters = LETTERS[: len(view.shape)]
    (a, a_array), (b, b_array) = (compact(view, f, letters) for f in (view.a, view.b))
    return jnp.einsum(f"{a},{b}->{letters}", a_array, b_array)


def materialise(view: View) -> Array:
    """Return `w + gamma A B` as one array: summed in at least float32, then cast as the program casts."""
    if view.a is None:
        return view.base
    delta = update(view)
    total = view.w.astype(jnp.promote_types(view.w.dtype, delta.dtype)) + delta
    return total.astype(view.dtype)


def rename(view: View, act: Callable[[Array, tuple[bool, ...]], Array], axes: Sequence[frozenset[int]]) -> View:
    """Apply one renaming to the weight and to both factors; `act` is told which axes its array spans."""
    everything = (True,) * len(view.shape)
    factors = [None if f is None else act(f, spans(view, f)) for f in (view.a, view.b)]
    return dataclasses.replace(view, w=act(view.w, everything), a=factors[0], b=factors[1], axes=tuple(axes))


def tail(array: Array, spanned: Sequence[bool]) -> tuple[int, ...]:
    """Return the sizes behind the weight's own axes: the rank in a factor, nothing in the weight."""
    return array.shape[len(spanned) :]


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Permute the axes of a view."""

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        return jnp.transpose(array, (*permutation, *range(len(spanned), array.ndim)))

    return rename(view, act, [view.axes[n] for n in permutation])


def reshape(view: View, sizes: Sequence[int]) -> View | None:
    """Reshape a view, or return None where that would merge an axis of A with one of B."""
    groups = reshape_groups(view.shape, sizes)
    if groups is None:
        return None
    for factor in (view.a, view.b):
        spanned = (True,) * len(view.shape) if factor is None else spans(view, factor)
        if any(len({spanned[n] for n in old if view.shape[n] != 1}) > 1 for old, _ in groups):
            return None
    axes: list[frozenset[int]] = [frozenset()] * len(sizes)
    for old, new in groups:
        for n in new:
            axes[n] = frozenset().union(*(view.axes[o] for o in old))

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        shape = [1] * len(sizes)
        for old, new in groups:
            for n in new:
                shape[n] = sizes[n] if all(spanned[o] for o in old if view.shape[o] != 1) else 1
        return jnp.reshape(array, (*shape, *tail(array, spanned)))

    return rename(view, act, axes)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Split a reshape into the smallest runs of axes that are reshaped among themselves.

    >>> reshape_groups((6, 4, 5), (2, 3, 20))
    [([0], [0, 1]), ([1, 2], [2])]
    """
    if math.prod(old) != math.prod(new) or 0 in (*old, *new):
        return None
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds: list[int] = []
        news: list[int] = []
        left = right = 1
        while True:
            if left <= right and i < len(old) and (left < right or not olds):
                left, i = left * old[i], i + 1
                olds.append(i - 1)
            elif j < len(new) and (right < left or not news):
                right, j = right * new[j], j + 1
                news.append(j - 1)
            else:
                break
        groups.append((olds, news))
    return groups


def squeeze(view: View, dimensions: Sequence[int]) -> View:
    """Drop axes of size 1."""
    gone = {n % len(view.shape) for n in dimensions}

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        return lax.squeeze(array, tuple(gone))

    return rename(view, act, [label for n, label in enumerate(view.axes) if n not in gone])


def slice_axes(view: View, starts: Sequence, limits: Sequence[int], strides: Sequence[int] | None) -> View:
    """Take a static slice along any axes."""

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        whole = tail(array, spanned)
        pick = lambda given, full: [g if s else full(n) for n, (g, s) in enumerate(zip(given, spanned, strict=True))]
        return lax.slice(
            array,
            (*pick(starts, lambda n: 0), *(0 for _ in whole)),
            (*pick(limits, lambda n: array.shape[n]), *whole),
            None if strides is None else (*pick(strides, lambda n: 1), *(1 for _ in whole)),
        )

    return rename(view, act, view.axes)


def dynamic_slice(view: View, starts: Sequence[Array], sizes: Sequence[int]) -> View:
    """Take a slice at traced positions along any axes."""

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        whole = tail(array, spanned)
        zero = jnp.zeros_like(starts[0])
        at = [s if there else zero for s, there in zip(starts, spanned, strict=True)]
        size = [n if there else 1 for n, there in zip(sizes, spanned, strict=True)]
        return lax.dynamic_slice(array, (*at, *(zero for _ in whole)), (*size, *whole))

    return rename(view, act, view.axes)
