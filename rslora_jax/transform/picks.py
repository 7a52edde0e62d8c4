"""Rows picked from a weight: what a `gather` along one of its axes means for its factors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.renames import renamed_weight, shared_where
from rslora_jax.transform.views import Axes, View, spans


@dataclasses.dataclass(frozen=True)
class Pick:
    """A gather that picks places along one axis of its operand, whole along all others.

    Attributes:
      row: the axis.
      stack: the axes that operand and indices share, element by element.
      params: the equation's own parameters, as pairs.
    """

    row: int
    stack: tuple[int, ...]
    params: tuple[tuple[str, Any], ...]

    @property
    def offset(self) -> tuple[int, ...]:
        """Where the operand's axes that are kept lie in the result."""
        return tuple(map(int, dict(self.params)["dimension_numbers"].offset_dims))

    @property
    def kept(self) -> list[int]:
        """The operand's axes that are kept, in the order of `offset`."""
        p = dict(self.params)
        gone = (*p["dimension_numbers"].collapsed_slice_dims, *self.stack)
        return [n for n in range(len(p["slice_sizes"])) if n not in gone]

    @property
    def batch(self) -> dict[int, int]:
        """The operand's axes that indices share, by the index's axis."""
        numbers = dict(self.params)["dimension_numbers"]
        return dict(zip(map(int, numbers.start_indices_batching_dims), self.stack, strict=True))

    def ndim(self, indices: Any) -> int:
        """The number of axes of the result."""
        return indices.ndim - 1 + len(self.offset)


def pick_of(params: dict[str, Any], shape: Sequence[int]) -> Pick | None:
    """Return a gather as a pick along one axis; None where it is another."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    stack = tuple(map(int, numbers.operand_batching_dims))
    places = [int(n) for n in numbers.start_index_map]
    rows = [n for n in places if sizes[n] != shape[n]]
    rows = rows or [n for n in places if n in numbers.collapsed_slice_dims] or places[:1]
    whole = all(sizes[n] == shape[n] for n in range(len(shape)) if n not in (*rows, *stack))
    # Along axes taken whole, an index can only be out of bounds: clipped it is 0, but a fill would be seen.
    fills = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if len(rows) != 1 or not whole or (fills and len(places) > 1):
        return None
    return Pick(rows[0], stack, tuple(params.items()))


def slice_as_pick(row: int, start: Array, shape: Sequence[int], sizes: Sequence[int]) -> tuple[Pick, Array]:
    """Return a slice along one axis, at a place that data say, as a pick, and the index that it takes."""
    ndim = len(shape)
    params = {
        "dimension_numbers": lax.GatherDimensionNumbers(tuple(range(ndim)), (), (row,)),
        "slice_sizes": tuple(sizes[n] if n == row else shape[n] for n in range(ndim)),
        "indices_are_sorted": True,
        "unique_indices": True,
        "mode": lax.GatherScatterMode.CLIP,
        "fill_value": None,
    }
    return Pick(row, (), tuple(params.items())), jnp.reshape(start, (1,))


def is_single(pick: Pick, indices: Array) -> bool:
    """Say whether one place is picked, as by `w[i]`, and not one for each of several."""
    return math.prod(indices.shape[:-1]) == 1 and indices.ndim == 1 + len(pick.stack)


def take(view: View, pick: Pick, indices: Array) -> View | None:
    """Pick from a weight, and from those of its parts that span the axis; the others stay.

    None where the weight and the indices share an axis that a part does not span.
    """
    for part in view.parts:
        if not all(spans(view, part)[n] for n in pick.stack):
            return None
    ndim, depth, p = pick.ndim(indices), len(view.shape), dict(pick.params)
    still = [axis for axis, at in zip(pick.kept, pick.offset, strict=True) if axis - depth == at - ndim]
    filled = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP  # with a number, which no packed array can hold
    moved = {0, *(n for n in range(depth) if n not in still or filled)}
    w = renamed_weight(view, picked, moved, (indices,), (pick, p["fill_value"]))
    # What is filled in is no weight: it gets no update.
    parts = [
        picked_gain(view, indices, pick) if part is view.gain else picked(part, indices, spans(view, part), pick, 0)
        for part in view.parts
    ]
    out = view.with_parts(w, parts, axes=tuple(_labels(view, pick, indices)))
    # Devices may pick different places.
    keeps = [not spans(view, part)[pick.row] and not (part is view.gain and filled) for part in view.parts]
    return shared_where(view, out, keeps)


def picked_gain(view: View, indices: Array, pick: Pick) -> Array | None:
    """Return a weight's gain where places of it are picked: one where a number is filled in, which it would scale."""
    if view.gain is None:
        return None
    spanned, p = spans(view, view.gain), dict(pick.params)
    gain = picked(view.gain, indices, spanned, pick, 1)
    filled = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP and p["fill_value"] not in (None, 0)
    if spanned[pick.row] or not filled:
        return gain
    own = tuple(axis in (pick.row, *pick.stack) for axis in range(len(view.shape)))
    ones = jnp.ones([size if there else 1 for size, there in zip(view.shape, own, strict=True)], gain.dtype)
    return jnp.where(picked(ones, indices, own, pick, 0) == 1, gain, 1)


def picked(array: Array, indices: Array, spanned: tuple[bool, ...], pick: Pick, fill: Any) -> Array:
    """Pick from a weight or from a part of its adapter, of which `spanned` says which axes it has."""
    p = dict(pick.params)
    numbers = p["dimension_numbers"]
    at = list(map(int, numbers.start_index_map)).index(pick.row)
    shared = tuple(pick.batch)
    once = [size if n in shared else 1 for n, size in enumerate(indices.shape[:-1])]
    ndim = pick.ndim(indices)
    places = indices[..., at : at + 1] if spanned[pick.row] else jnp.zeros((*once, 1), indices.dtype)
    cut = (pick.row, *pick.stack)
    sizes = [p["slice_sizes"][n] if there and n in cut else array.shape[n] for n, there in enumerate(spanned)]
    tail = array.shape[len(spanned) :]
    return lax.gather(
        array,
        places,
        lax.GatherDimensionNumbers(
            (*pick.offset, *range(ndim, ndim + len(tail))),
            tuple(map(int, numbers.collapsed_slice_dims)),
            (pick.row,),
            pick.stack,
            shared,
        ),
        (*sizes, *tail),
        indices_are_sorted=p["indices_are_sorted"],
        unique_indices=p["unique_indices"] and spanned[pick.row],
        mode=p["mode"],
        fill_value=fill,
    )


def _labels(view: View, pick: Pick, indices: Array) -> list[Axes]:
    """Return the stored axes that each axis of a pick's result is made of."""
    kept = dict(zip(pick.offset, pick.kept, strict=True))
    ndim, index_axes = pick.ndim(indices), iter(range(pick.ndim(indices)))
    return [view.axes[kept[n] if n in kept else pick.batch.get(next(index_axes), pick.row)] for n in range(ndim)]
