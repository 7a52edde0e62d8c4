"""Weights that a program joins into one, as a fused projection does with q, k and v."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.stored.deferred import deferred
from rslora_jax.stored.form import is_stored
from rslora_jax.transform.probe import Probe, one_past
from rslora_jax.transform.renames import without_gain
from rslora_jax.transform.views import View, spans


def concatenate(parts: Sequence[View | Array], axis: int) -> View | None:
    """Join weights along an axis, or return None where their factors do not fit each other.

    Along a stack axis both factors are joined, and so are parts of size 1, which makes a stack of them. Else
    the ranks add up: the factors that do not span the axis lie side by side, and those that do become the
    blocks of a matrix that is zero elsewhere. Slices of one weight share a factor and keep their rank.
    """
    joined = _joined(parts, axis)
    uses = {p.uses for p in parts if isinstance(p, View)}
    if joined is None or uses == {()}:
        return joined
    # What is whose of the rank holds only where the rank is still that of the one weight.
    ranks = {p.factors[0].shape[-1] for p in [joined, *parts] if isinstance(p, View) and p.factors}
    return joined if len(uses) == 1 and len(ranks) <= 1 and not joined.along and joined.gain is None else None


def _joined(parts: Sequence[View | Array], axis: int) -> View | None:
    """Join weights as `concatenate` does, with no regard to uses."""
    gained = _with_gains_to_join(parts, axis)
    if gained is None:
        return None
    parts, gain = gained
    parts = _with_one_gamma(parts)
    views = [p for p in parts if isinstance(p, View)]
    joined = dataclasses.replace(_join_bases(parts, axis), gain=gain, along=_along(views, axis))
    if not any(v.factors for v in views):
        return joined
    adapted = [v for v in views if v.factors]
    pairs = [_in_order(v, adapted[0], axis) for v in adapted]
    if any(pair is None for pair in pairs) or any(v.along.keys() != views[0].along.keys() for v in views):
        return None
    across, along = ([*factors] for factors in zip(*pairs, strict=True))
    sides = {
        (f.shape[axis] > 1, g.shape[axis] > 1)
        for f, g, v in zip(across, along, adapted, strict=True)
        if v.shape[axis] > 1
    }
    all_adapted = len(adapted) == len(parts)
    joined = dataclasses.replace(joined, gamma=adapted[0].gamma)
    if all_adapted and sides <= {(True, True)}:
        rank = max(f.shape[-1] for f in across)
        factors = tuple(lax.concatenate([_widen(f, rank) for f in of], axis) for of in (across, along))
        return dataclasses.replace(joined, factors=factors)
    if sides not in ({(True, False)}, {(False, True)}):
        return None
    swapped = sides == {(False, True)}
    if swapped:
        across, along = along, across
    ndim = len(joined.shape)
    if all_adapted and all(f is along[0] for f in along):
        one, other = lax.concatenate(across, axis), along[0]
    else:
        one, other = lax.concatenate(_blocks(parts, across, axis), ndim), lax.concatenate(along, ndim)
    return dataclasses.replace(joined, factors=(other, one) if swapped else (one, other))


def total(left: View, right: View) -> View | None:
    """Add two weights: their ranks add up; None where their factors span different axes."""
    bare = [without_gain(view) for view in (left, right)]
    if bare[0] is None or bare[1] is None or bool(left.factors) != bool(right.factors) or left.uses or right.uses:
        return None
    left, right = _with_one_gamma(bare)  # type: ignore[assignment, arg-type]
    if is_stored(left.w) or is_stored(right.w):
        w: Any = deferred(_sum_of, _stored_first(left.w, right.w), (left.dtype, right.dtype, is_stored(left.w)))
    else:
        w = left.base + right.base
    axes = tuple(one | other for one, other in zip(left.axes, right.axes, strict=True))
    both = _of_both([left, right], w=w, dtype=w.dtype, axes=axes, factors=(), uniform=(), along=_along([left, right]))
    if not left.factors:
        return both
    pair = _in_order(right, left, -1)
    if pair is None or left.along.keys() != right.along.keys():
        return None
    factors = tuple(jnp.concatenate(of, -1) for of in zip(left.factors, pair, strict=True))
    return dataclasses.replace(both, factors=factors)


def _stored_first(left: Any, right: Any) -> tuple[Any, Any]:
    return (left, right) if is_stored(left) else (right, left)


def _sum_of(one: Array, other: Array, left: Any, right: Any, in_order: bool) -> Array:
    first, second = (one, other) if in_order else (other, one)
    return first.astype(left) + second.astype(right)


def _of_both(views: Sequence[View], **changes: Any) -> View:
    """Return the first of some views with what it then is, and with the paths and the past of all."""
    sites = tuple(dict.fromkeys(site for v in views for site in v.sites))
    probes = [v for v in views if isinstance(v, Probe)]
    past: dict[str, Any] = {"past": one_past(probes)} if probes else {}
    return dataclasses.replace(views[0], sites=sites, **past, **changes)


def _join_bases(parts: Sequence[View | Array], axis: int) -> View:
    """Return the joined weight without an adapter; it keeps its stored dtype where all parts have the same."""
    views = [p for p in parts if isinstance(p, View)]
    keep = len(views) == len(parts) and len({v.w.dtype for v in views}) == 1
    if len(views) == len(parts) and _fit(views, axis):
        w: Any = jax.tree.map(lambda *arrays: lax.concatenate(arrays, axis), *(v.w for v in views))
    elif len(views) == len(parts) and any(is_stored(v.w) for v in views):
        order = sorted(range(len(views)), key=lambda n: not is_stored(views[n].w))
        dtypes = tuple(views[n].w.dtype if keep else views[n].dtype for n in order)
        w = deferred(_concatenated, [views[n].w for n in order], (dtypes, tuple(order), axis))
    else:
        w = lax.concatenate([(p.w if keep else p.base) if isinstance(p, View) else p for p in parts], axis)
    axes = tuple(frozenset().union(*(v.axes[n] for v in views)) for n in range(len(views[0].shape)))
    both = min((v.shared[:2] for v in views), key=len)
    uniform = tuple(of.intersection(*(v.shared[n] for v in views)) for n, of in enumerate(both))
    whole = not any(v.gain is not None or v.along for v in views) and all(v.uniform for v in views)
    return _of_both(views, w=w, axes=axes, factors=(), gain=None, along={}, uniform=uniform if whole else ())


def _fit(views: Sequence[View], axis: int) -> bool:
    """Say whether stored weights can be joined as they are: along their stack, and in one form."""

    def form(w: Any) -> tuple[Any, ...]:
        arrays = [(array.dtype, array.shape[:axis], array.shape[axis + 1 :]) for array in jax.tree.leaves(w)]
        return (jax.tree.structure(w), *arrays)

    along_stack = all(is_stored(v.w) and axis < len(v.w.stack) for v in views)
    return along_stack and len({form(v.w) for v in views}) == 1


def _concatenated(*arguments: Any) -> Array:
    *arrays, dtypes, order, axis = arguments
    cast = [array.astype(dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
    return lax.concatenate([cast[order.index(n)] for n in range(len(cast))], axis)


def _with_gains_to_join(parts: Sequence[Any], axis: int) -> tuple[Sequence[Any], Array | None] | None:
    """Return the parts, and the gain of them joined; where the gains cannot be joined, they are multiplied in."""
    views = [p for p in parts if isinstance(p, View)]
    gains = [v.gain for v in views if v.gain is not None]
    if not gains:
        return parts, None
    spanned = {spans(v, v.gain)[axis] for v in views if v.gain is not None}
    if len(gains) == len(parts) and spanned == {False} and all(gain is gains[0] for gain in gains):
        return parts, gains[0]
    if len(gains) == len(parts) and spanned == {True}:
        others = {(*g.shape[:axis], *g.shape[axis + 1 :]) for g in gains}
        if len(others) == 1:
            return parts, lax.concatenate(gains, axis)
    bare = [without_gain(p) if isinstance(p, View) else p for p in parts]
    return None if any(p is None for p in bare) else (bare, None)


def _along(views: Sequence[View], axis: int | None = None) -> Mapping[str, Array]:
    """Return what goes along with joined weights: that of each at its place on a stack, else one for all."""
    found = {}
    for name in views[0].along:
        arrays = [v.along[name] for v in views if name in v.along]
        each = axis is not None and all(spans(v, v.along[name])[axis] for v in views if name in v.along)
        found[name] = lax.concatenate(arrays, axis) if each and axis is not None else sum(arrays[1:], arrays[0])
    return found


def _with_one_gamma(parts: Sequence[View | Array]) -> Sequence[View | Array]:
    """Return the parts with the same scale: where theirs differ, each is multiplied into its own B."""
    if len({p.gamma for p in parts if isinstance(p, View) and p.factors}) <= 1:
        return parts
    return [_scaled_in(p) if isinstance(p, View) and p.factors else p for p in parts]


def _scaled_in(view: View) -> View:
    first, second = view.factors
    return dataclasses.replace(view, factors=(first, view.gamma * second), gamma=1.0)


def _in_order(view: View, like: View, axis: int) -> tuple[Array, Array] | None:
    """Return a view's factors in the order of another's, by the axes they span; None where they differ."""

    def spanned(view: View, factor: Array) -> list[bool]:
        return [s for n, s in enumerate(spans(view, factor)) if n != axis]

    want = [spanned(like, factor) for factor in like.factors]
    for pair in (view.factors, view.factors[::-1]):
        if [spanned(view, factor) for factor in pair] == want:
            return pair  # type: ignore[return-value]
    return None


def _blocks(parts: Sequence[View | Array], factors: Sequence[Array], axis: int) -> list[Array]:
    """Pad each part's factor with zeros to the length of the whole."""
    whole = sum(p.shape[axis] for p in parts)
    padded, start, left = [], 0, list(factors)
    for part in parts:
        end = start + part.shape[axis]
        if isinstance(part, View) and part.factors:
            f = left.pop(0)
            config = [(start, whole - end, 0) if n == axis else (0, 0, 0) for n in range(f.ndim)]
            padded.append(lax.pad(f, jnp.zeros((), f.dtype), config))
        start = end
    return padded


def _widen(factor: Array, rank: int) -> Array:
    """Pad a factor with zeros to a larger rank."""
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 1) + [(0, rank - factor.shape[-1])])
