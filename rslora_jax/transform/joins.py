"""Weights that a program joins into one, as a fused projection does with q, k and v."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.views import View, one_past, spans


def concatenate(parts: Sequence[View | Array], axis: int) -> View | None:
    """Join weights along an axis, or return None where their factors do not fit each other.

    Along a stack axis both factors are joined, and so are parts of size 1, which makes a stack of them. Else
    the ranks add up: the factors that do not span the axis lie side by side, and those that do become the
    blocks of a matrix that is zero elsewhere. Slices of one weight share a factor and keep their rank.
    """
    parts = with_one_gamma(parts)
    views = [p for p in parts if isinstance(p, View)]
    joined = join_bases(parts, axis)
    if views[0].a is None:
        return joined
    pairs = [in_order(v, views[0], axis) for v in views]
    if any(pair is None for pair in pairs):
        return None
    across, along = ([*factors] for factors in zip(*pairs, strict=True))  # type: ignore[arg-type]
    sides = {
        (f.shape[axis] > 1, g.shape[axis] > 1)
        for f, g, v in zip(across, along, views, strict=True)
        if v.shape[axis] > 1
    }
    all_views = len(views) == len(parts)
    if all_views and sides <= {(True, True)}:
        rank = max(f.shape[-1] for f in across)
        a, b = (lax.concatenate([widen(f, rank) for f in factors], axis) for factors in (across, along))
        return dataclasses.replace(joined, a=a, b=b)
    if sides not in ({(True, False)}, {(False, True)}):
        return None
    swapped = sides == {(False, True)}
    if swapped:
        across, along = along, across
    if all_views and all(f is along[0] for f in along):
        one, other = lax.concatenate(across, axis), along[0]
    else:
        one, other = lax.concatenate(blocks(parts, across, axis), joined.w.ndim), lax.concatenate(along, joined.w.ndim)
    return dataclasses.replace(joined, a=other if swapped else one, b=one if swapped else other)


def total(left: View, right: View) -> View | None:
    """Add two weights: their ranks add up; None where their factors span different axes."""
    left, right = with_one_gamma([left, right])  # type: ignore[assignment]
    w = left.base + right.base
    both = dataclasses.replace(
        left,
        w=w,
        dtype=w.dtype,
        axes=tuple(one | other for one, other in zip(left.axes, right.axes, strict=True)),
        sites=tuple(dict.fromkeys(left.sites + right.sites)),
        uniform=(frozenset(), frozenset()),
        past=one_past([left, right]),
    )
    if left.a is None:
        return both
    pair = in_order(right, left, -1)
    if pair is None:
        return None
    a, b = (jnp.concatenate(of, -1) for of in zip((left.a, left.b), pair, strict=True))
    return dataclasses.replace(both, a=a, b=b)


def join_bases(parts: Sequence[View | Array], axis: int) -> View:
    """Return the joined weight without factors; it keeps its stored dtype where all parts have the same."""
    views = [p for p in parts if isinstance(p, View)]
    keep = len(views) == len(parts) and len({v.w.dtype for v in views}) == 1
    arrays = [(p.w if keep else p.base) if isinstance(p, View) else p for p in parts]
    return View(
        lax.concatenate(arrays, axis),
        None,
        None,
        tuple(frozenset().union(*(v.axes[n] for v in views)) for n in range(len(views[0].shape))),
        views[0].dtype,
        tuple(dict.fromkeys(site for v in views for site in v.sites)),
        views[0].gamma,
        (
            views[0].uniform[0].intersection(*(v.uniform[0] for v in views)),
            views[0].uniform[1].intersection(*(v.uniform[1] for v in views)),
        ),
        one_past(views),
    )


def with_one_gamma(parts: Sequence[View | Array]) -> Sequence[View | Array]:
    """Return the parts with the same scale: where theirs differ, each is multiplied into its own B."""
    if len({p.gamma for p in parts if isinstance(p, View)}) == 1:
        return parts
    return [dataclasses.replace(p, b=p.gamma * p.b, gamma=1.0) if isinstance(p, View) else p for p in parts]


def in_order(view: View, like: View, axis: int) -> tuple[Array, Array] | None:
    """Return a view's factors in the order of another's, by the axes they span; None where they differ."""
    spanned = lambda v, f: [s for n, s in enumerate(spans(v, f)) if n != axis]
    want = [spanned(like, like.a), spanned(like, like.b)]
    for pair in ((view.a, view.b), (view.b, view.a)):
        if [spanned(view, f) for f in pair] == want:
            return pair
    return None


def blocks(parts: Sequence[View | Array], factors: Sequence[Array], axis: int) -> list[Array]:
    """Pad each part's factor with zeros to the length of the whole."""
    whole = sum(p.shape[axis] for p in parts)
    padded, start, left = [], 0, list(factors)
    for part in parts:
        end = start + part.shape[axis]
        if isinstance(part, View):
            f = left.pop(0)
            padded.append(
                lax.pad(
                    f,
                    jnp.zeros((), f.dtype),
                    [(start, whole - end, 0) if n == axis else (0, 0, 0) for n in range(f.ndim)],
                )
            )
        start = end
    return padded


def widen(factor: Array, rank: int) -> Array:
    """Pad a factor with zeros to a larger rank."""
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 1) + [(0, rank - factor.shape[-1])])
