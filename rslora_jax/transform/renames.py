"""Everything a program can do to a weight that leaves it a weight: renaming its axes, scaling it, joining it.

Each function acts on the weight and on both factors so that `materialise` of its result is the same
operation on `materialise` of what it was given.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform import compat
from rslora_jax.transform.explicit import explicit_mesh, lay_factor
from rslora_jax.transform.views import Axes, View, spans, wide


def rename(view: View, act: Callable[[Array, tuple[bool, ...]], Array], axes: Sequence[Axes]) -> View:
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
    axes: list[Axes] = [frozenset()] * len(sizes)
    for old, new in groups:
        for n in new:
            axes[n] = (
                frozenset().union(*(view.axes[o] for o in old if view.shape[o] != 1)) if sizes[n] != 1 else axes[n]
            )
    # Axes of size 1 come and go: those that are there keep their order.
    ones = [view.axes[o] for o, size in enumerate(view.shape) if size == 1]
    for n, label in zip([n for n, size in enumerate(sizes) if size == 1], ones, strict=False):
        axes[n] = label

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


def slice_axes(view: View, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None) -> View:
    """Take a static slice along any axes."""

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        own = list(zip(starts, limits, strides or [1] * len(spanned), strict=True))
        own = [bounds if s else (0, 1, 1) for s, bounds in zip(spanned, own, strict=True)]
        bounds = [*own, *((0, size, 1) for size in tail(array, spanned))]
        if bounds == [(0, size, 1) for size in array.shape]:
            return array  # untouched, so that joining the slices again can see that they share it
        return lax.slice(array, *zip(*bounds, strict=True))

    return rename(view, act, view.axes)


def dynamic_slice(view: View, starts: Sequence[Array], sizes: Sequence[int]) -> View:
    """Take a slice at traced positions along any axes."""

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        whole = tail(array, spanned)
        zero = jnp.zeros_like(starts[0])
        at = [s if there else zero for s, there in zip(starts, spanned, strict=True)]
        size = [n if there else 1 for n, there in zip(sizes, spanned, strict=True)]
        return lax.dynamic_slice(array, (*at, *(zero for _ in whole)), (*size, *whole))

    out = rename(view, act, view.axes)
    cut = [n for n, (size, full) in enumerate(zip(sizes, view.shape, strict=True)) if size != full]
    # Devices may slice at different places.
    keeps = lambda f: f is None or not any(spans(view, f)[n] for n in cut)
    return dataclasses.replace(out, uniform=uniform_where(view, keeps(view.a), keeps(view.b)))


def uniform_where(view: View, a: bool, b: bool) -> tuple[frozenset[str], frozenset[str]]:
    """Return along which mesh axes the factors are known to be the same, once something was done to one of them."""
    return (view.uniform[0] if a else frozenset(), view.uniform[1] if b else frozenset())


def reverse(view: View, dimensions: Sequence[int]) -> View:
    """Reverse the order along some axes."""
    return rename(view, lambda array, spanned: lax.rev(array, dimensions), view.axes)


def pad(view: View, value: Array, config: Sequence[tuple[int, int, int]]) -> View:
    """Pad the weight with a value, and the factors with zeros where they span the axis."""

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        is_weight = array.ndim == len(spanned)
        padding = [c if s else (0, 0, 0) for c, s in zip(config, spanned, strict=True)]
        fill = value.astype(array.dtype) if is_weight else jnp.zeros((), array.dtype)
        return lax.pad(array, fill, [*padding, *((0, 0, 0) for _ in tail(array, spanned))])

    return rename(view, act, view.axes)


def broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    """Add axes, along which the weight repeats; both factors repeat with it, as along a stack axis."""
    origin = {new: old for old, new in enumerate(dimensions)}

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        sizes = [
            size if new not in origin or view.shape[origin[new]] != size else array.shape[origin[new]]
            for new, size in enumerate(shape)
        ]
        whole = tail(array, spanned)
        return lax.broadcast_in_dim(array, (*sizes, *whole), (*dimensions, *range(len(shape), len(shape) + len(whole))))

    return rename(view, act, [view.axes[origin[n]] if n in origin else frozenset() for n in range(len(shape))])


def scale(view: View, by: Array, act: Callable[[Array, Array], Array]) -> View | None:
    """Multiply or divide by an array that varies along the axes of one factor only; else return None."""
    if by.ndim not in (0, len(view.shape)) or any(n == 1 != m for n, m in zip(view.shape, by.shape, strict=False)):
        return None
    varies = [n for n, size in enumerate(by.shape) if size != 1]
    w, a, b = act(view.base, by), view.a, view.b
    if view.a is not None:
        # A complex number makes a complex factor.
        of = by.astype(wide(by.dtype, view.a.dtype) if jnp.iscomplexobj(by) else view.a.dtype)[..., None]
        if all(spans(view, view.b)[n] for n in varies):
            b = act(view.b.astype(of.dtype), of)
        elif all(spans(view, view.a)[n] for n in varies):
            a = act(view.a.astype(of.dtype), of)
        else:
            return None
    same = not compat.is_tracer(by)
    uniform = uniform_where(view, same or a is view.a, same or b is view.b)
    return dataclasses.replace(view, w=w, a=a, b=b, dtype=w.dtype, uniform=uniform)


def lay(view: View, w: Array) -> View:
    """Put `w`, which is the weight laid in another way, in its place; the factors are laid as it is."""
    own = lambda f: lay_factor(f, spans(view, f), w) if f is not None and explicit_mesh(w, f) else f
    return dataclasses.replace(view, w=w, a=own(view.a), b=own(view.b))


def shift(view: View, by: Array, act: Callable[[Array, Array], Array]) -> View | None:
    """Add or subtract an array, which leaves the factors as they are."""
    if by.ndim not in (0, len(view.shape)) or any(n == 1 != m for n, m in zip(view.shape, by.shape, strict=False)):
        return None
    w = act(view.base, by)
    return dataclasses.replace(view, w=w, dtype=w.dtype)


def negate(view: View) -> View:
    """Change the sign."""
    return dataclasses.replace(view, w=-view.w, b=None if view.b is None else -view.b)
