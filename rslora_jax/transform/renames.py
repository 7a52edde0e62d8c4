"""Everything a program can do to a weight that leaves it a weight: renaming its axes, scaling it, joining it.

Each function acts on the weight and on the parts of its adapter so that `materialise` of its result is the same
operation on `materialise` of what it was given.

What is done to the arrays are functions of this module (`_transposed` and others): of an array, which axes of the
weight it spans, and what else the operation needs. An array may have axes of its own behind those of the weight, and
fewer or more places along the axes that the operation leaves alone: so a stored weight takes it to its own arrays, or
puts it off (`stored/`).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rslora_jax.stored.deferred import deferred
from rslora_jax.stored.form import Stored, is_stored
from rslora_jax.transform import compat
from rslora_jax.transform.explicit import explicit_mesh, lay_factor
from rslora_jax.transform.views import Axes, View, spans, wide

_Spanned = tuple[bool, ...]


def rename(
    view: View,
    act: Callable[..., Array],
    axes: Sequence[Axes],
    moved: Collection[int],
    operands: Sequence[Any] = (),
    others: tuple[Any, ...] = (),
) -> View:
    """Apply one renaming to the weight and to all parts: `act(array, *operands, spanned, *others)`.

    Args:
      view: the weight.
      act: a function of a module; `spanned` says which of the weight's axes its array spans.
      axes: the labels of the result.
      moved: the weight's axes that are cut, merged, or that lie elsewhere in the result, counted from the last.
      operands, others: of `act`: arrays, and what is hashable.
    """
    parts = [act(part, *operands, spans(view, part), *others) for part in view.parts]
    return view.with_parts(renamed_weight(view, act, moved, operands, others), parts, axes=tuple(axes))


def renamed_weight(view: View, act: Callable[..., Array], moved: Collection[int], operands: Any, others: Any) -> Any:
    """Return the weight alone, renamed; arguments as of `rename`."""
    everything = (True,) * len(view.shape)
    if not is_stored(view.w):
        return act(view.w, *operands, everything, *others)
    if max(moved, default=-1) < len(view.w.stack):
        return _packed(view.w, lambda array, spanned: act(array, *operands, spanned, *others))
    return deferred(act, (view.w, *operands), (everything, *others), min(moved))


def _packed(w: Stored, act: Callable[[Array, _Spanned], Array]) -> Stored:
    """Do to the arrays of a stored weight what is done to its stack."""
    depth, inner = len(w.stack), len(w.inner)
    spanned = (True,) * depth + (False,) * inner

    def one(array: Array) -> Array:
        out = act(array.reshape(*array.shape[:depth], *(1,) * inner, *array.shape[depth:]), spanned)
        tail = array.ndim - depth
        return out.reshape(*out.shape[: out.ndim - inner - tail], *out.shape[out.ndim - tail :])

    return jax.tree.map(one, w)


def untouched(view: View, act: Callable[[Array], Array]) -> View:
    """Do to all arrays of a view, the stored weight's own too, what has no regard to shapes."""
    return view.with_parts(jax.tree.map(act, view.w), [act(part) for part in view.parts])


def _tail(array: Array, spanned: _Spanned) -> tuple[int, ...]:
    """Return the sizes behind the weight's own axes, such as the rank of a factor."""
    return array.shape[len(spanned) :]


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Permute the axes of a view."""
    order = tuple(permutation)
    moved = [n for n, old in enumerate(order) if n != old]
    return rename(view, _transposed, [view.axes[n] for n in order], moved, (), (order,))


def _transposed(array: Array, spanned: _Spanned, order: tuple[int, ...]) -> Array:
    return jnp.transpose(array, (*order, *range(len(spanned), array.ndim)))


def reshape(view: View, sizes: Sequence[int]) -> View | None:
    """Reshape a view, or return None where that would merge an axis that a part spans with one that it does not."""
    shape = view.shape
    groups = reshape_groups(shape, sizes)
    if groups is None:
        return None
    for part in view.parts:
        spanned = spans(view, part)
        if any(len({spanned[n] for n in old if shape[n] != 1}) > 1 for old, _ in groups):
            return None
    axes: list[Axes] = [frozenset()] * len(sizes)
    for old, new in groups:
        for n in new:
            axes[n] = frozenset().union(*(view.axes[o] for o in old if shape[o] != 1)) if sizes[n] != 1 else axes[n]
    # Axes of size 1 come and go: those that are there keep their order.
    ones = [view.axes[o] for o, size in enumerate(shape) if size == 1]
    for n, label in zip([n for n, size in enumerate(sizes) if size == 1], ones, strict=False):
        axes[n] = label
    matrices = [([o for o in old if shape[o] != 1], [n for n in new if sizes[n] != 1]) for old, new in groups]
    kept = {old[0] for old, new in matrices if len(old) == len(new) == 1 and old[0] - len(shape) == new[0] - len(sizes)}
    moved = [n for n in range(len(shape)) if n not in kept]
    fixed = tuple((tuple(o for o in old if shape[o] != 1), tuple(new), (*old,) == (*new,)) for old, new in groups)
    return rename(view, _reshaped, axes, moved, (), (fixed, tuple(sizes)))


def _reshaped(array: Array, spanned: _Spanned, groups: Sequence[Any], sizes: tuple[int, ...]) -> Array:
    shape = [1] * len(sizes)
    for old, new, same in groups:
        for n in new:
            whole = array.shape[n] if same and len(new) == 1 else sizes[n]
            shape[n] = whole if all(spanned[o] for o in old) else 1
    return jnp.reshape(array, (*shape, *_tail(array, spanned)))


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
    gone = tuple(sorted({n % len(view.shape) for n in dimensions}))
    return rename(view, _squeezed, [label for n, label in enumerate(view.axes) if n not in gone], gone, (), (gone,))


def _squeezed(array: Array, spanned: _Spanned, gone: tuple[int, ...]) -> Array:
    return lax.squeeze(array, gone)


def slice_axes(view: View, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None) -> View:
    """Take a static slice along any axes."""
    bounds = zip(starts, limits, strides or [1] * len(view.shape), strict=True)
    cuts = tuple(None if b == (0, size, 1) else b for b, size in zip(bounds, view.shape, strict=True))
    return rename(view, _sliced, view.axes, [n for n, cut in enumerate(cuts) if cut], (), (cuts,))


def _sliced(array: Array, spanned: _Spanned, cuts: Sequence[tuple[int, int, int] | None]) -> Array:
    own = [cut if there else None for there, cut in zip(spanned, cuts, strict=True)]
    if not any(own):
        return array  # untouched, so that joining the slices again can see that they share it
    bounds = [cut or (0, size, 1) for cut, size in zip([*own, *[None] * array.ndim], array.shape, strict=False)]
    return lax.slice(array, *zip(*bounds, strict=True))


def dynamic_slice(view: View, starts: Sequence[Array], sizes: Sequence[int]) -> View:
    """Take a slice at traced positions along any axes."""
    shape = view.shape
    cut = tuple(n for n, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full)
    out = rename(view, _dynamically_sliced, view.axes, cut, starts, (tuple(sizes), cut))
    # Devices may slice at different places.
    return shared_where(view, out, [not any(spans(view, part)[n] for n in cut) for part in view.parts])


def _dynamically_sliced(array: Array, *rest: Any) -> Array:
    *starts, spanned, sizes, cut = rest
    zero = jnp.zeros_like(starts[0])
    at = [s if there and n in cut else zero for n, (s, there) in enumerate(zip(starts, spanned, strict=True))]
    size = [sizes[n] if there and n in cut else array.shape[n] for n, there in enumerate(spanned)]
    tail = _tail(array, spanned)
    return lax.dynamic_slice(array, (*at, *(zero for _ in tail)), (*size, *tail))


def shared_where(view: View, out: View, keeps: Sequence[bool]) -> View:
    """Return a result in which the parts that do not keep it are no longer known to be the same on all devices."""
    if not view.uniform:
        return out
    kept = tuple(axes if keep else frozenset() for axes, keep in zip(view.uniform, keeps, strict=True))
    return dataclasses.replace(out, uniform=kept)


def reverse(view: View, dimensions: Sequence[int]) -> View:
    """Reverse the order along some axes."""
    return rename(view, _reversed, view.axes, tuple(dimensions), (), (tuple(dimensions),))


def _reversed(array: Array, spanned: _Spanned, dimensions: tuple[int, ...]) -> Array:
    return lax.rev(array, dimensions)


def pad(view: View, value: Array, config: Sequence[tuple[int, int, int]]) -> View:
    """Pad the weight with a value, and its adapter so that it changes nothing there."""
    config = tuple((low, high, inner) for low, high, inner in config)

    def act(part: Array, fill: int) -> Array:
        return _padded(part, jnp.asarray(fill, part.dtype), spans(view, part), config)

    w = renamed_weight(view, _padded, [n for n, c in enumerate(config) if any(c)], (value,), (config,))
    gain = None if view.gain is None else _padded_gain(view, view.gain, value, config)
    along = {name: act(part, 0) for name, part in view.along.items()}
    return dataclasses.replace(view, w=w, factors=tuple(act(f, 0) for f in view.factors), gain=gain, along=along)


def _padded_gain(view: View, gain: Array, value: Array, config: tuple[tuple[int, int, int], ...]) -> Array:
    """Return a gain that is one where the weight is padded: the value there is no weight, which it would scale."""
    spanned = spans(view, gain)
    own = tuple(any(c) for c in config)
    out = _padded(gain, jnp.ones((), gain.dtype), spanned, config)
    zero = not compat.is_tracer(value) and not np.any(value)
    if zero or all(there for there, padded in zip(spanned, own, strict=True) if padded):
        return out
    ones = jnp.ones([size if padded else 1 for size, padded in zip(view.shape, own, strict=True)], gain.dtype)
    return jnp.where(_padded(ones, jnp.zeros((), gain.dtype), own, config) == 1, out, 1)


def _padded(array: Array, value: Array, spanned: _Spanned, config: tuple[tuple[int, int, int], ...]) -> Array:
    padding = [c if s else (0, 0, 0) for c, s in zip(config, spanned, strict=True)]
    return lax.pad(array, value.astype(array.dtype), [*padding, *((0, 0, 0) for _ in _tail(array, spanned))])


def broadcast(view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
    """Add axes, along which the weight repeats; its parts repeat with it, as along a stack axis."""
    place, old = tuple(dimensions), view.shape
    origin = {new: n for n, new in enumerate(place)}
    grown = tuple(new not in origin or old[origin[new]] != size for new, size in enumerate(shape))
    moved = [n for n, new in enumerate(place) if new - len(shape) != n - len(old) or grown[new]]
    if any(grown):
        moved = [*moved, *range(len(view.w.stack))] if is_stored(view.w) else moved
    axes = [view.axes[origin[n]] if n in origin else frozenset() for n in range(len(shape))]
    return rename(view, _broadcast, axes, moved, (), (tuple(shape), place, grown))


def _broadcast(
    array: Array, spanned: _Spanned, shape: tuple[int, ...], place: tuple[int, ...], grown: tuple[bool, ...]
) -> Array:
    own = {new: array.shape[n] for n, new in enumerate(place)}
    sizes = [size if grown[new] else own[new] for new, size in enumerate(shape)]
    tail = _tail(array, spanned)
    return lax.broadcast_in_dim(array, (*sizes, *tail), (*place, *range(len(shape), len(shape) + len(tail))))


def scale(view: View, by: Array, act: Callable[..., Array]) -> View | None:
    """Multiply or divide by an array that varies along the axes of one factor only; else return None."""
    if _misaligned(view, by):
        return None
    varies = [n for n, size in enumerate(by.shape) if size != 1]
    factors, changed = view.factors, -1
    if factors:
        # A complex number makes a complex factor.
        of = by.astype(wide(by.dtype, factors[0].dtype) if jnp.iscomplexobj(by) else factors[0].dtype)[..., None]
        fits = [n for n in (1, 0) if all(spans(view, factors[n])[axis] for axis in varies)]
        if not fits:
            return None
        changed = fits[0]
        factors = tuple(act(f.astype(of.dtype), of) if n == changed else f for n, f in enumerate(factors))
    w = _entrywise(view, by, act)
    out = dataclasses.replace(view, w=w, factors=factors, dtype=w.dtype)
    return shared_where(view, out, [n != changed or not compat.is_tracer(by) for n in range(len(view.parts))])


def shift(view: View, by: Array, act: Callable[..., Array]) -> View | None:
    """Add or subtract an array, which leaves the factors as they are; None where a gain would scale it too."""
    if _misaligned(view, by) or view.gain is not None:
        return None
    w = _entrywise(view, by, act)
    return dataclasses.replace(view, w=w, dtype=w.dtype)


def _misaligned(view: View, by: Array) -> bool:
    return by.ndim not in (0, len(view.shape)) or any(n == 1 != m for n, m in zip(view.shape, by.shape, strict=False))


def _entrywise(view: View, by: Array, act: Callable[..., Array]) -> Any:
    """Return the weight, as the program has cast it, with an array of its shape or a number, entry by entry."""
    if not is_stored(view.w) or compat.is_tracer(by):
        return act(view.base, by)
    return deferred(_cast_then, (view.w, by), (view.dtype, act))


def cast(w: Any, dtype: Any) -> Any:
    """Return a weight in another dtype; a stored one has it where it is used."""
    return deferred(_cast, (w,), (dtype,), w.ndim) if is_stored(w) else w.astype(dtype)


def _cast(w: Array, dtype: Any) -> Array:
    return w.astype(dtype)


def _cast_then(w: Array, by: Array, dtype: Any, act: Callable[..., Array]) -> Array:
    return act(w.astype(dtype), by)


def negate(view: View) -> View:
    """Change the sign."""
    w = deferred(_negative, (view.w,), (), view.w.ndim) if is_stored(view.w) else -view.w
    factors = (view.factors[0], -view.factors[1]) if view.factors else ()
    return dataclasses.replace(view, w=w, factors=factors)


def _negative(w: Array) -> Array:
    return -w


def lay(view: View, w: Any) -> View:
    """Put `w`, which is the weight laid in another way, in its place; the parts are laid as it is."""
    parts = [lay_factor(part, spans(view, part), w) if explicit_mesh(w, part) else part for part in view.parts]
    return view.with_parts(w, parts)


def without_gain(view: View) -> View | None:
    """Return a view with its gain multiplied into the weight and into a factor; None where that cannot be."""
    if view.gain is None:
        return view
    dtype = wide(view.w.dtype, view.gain.dtype)  # or the gain would be rounded, and the weight once more
    out = scale(dataclasses.replace(view, gain=None, uniform=(), dtype=dtype), view.gain.astype(dtype), jnp.multiply)
    return None if out is None else dataclasses.replace(out, dtype=view.dtype)
