"""Rows picked from a weight: what a `gather` along one of its axes means for its factors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.renames import rename, uniform_where
from rslora_jax.transform.views import Axes, View, spans


@dataclasses.dataclass(frozen=True)
class Pick:
    """A gather that picks places along one axis of its operand, whole along all others.

    Attributes:
      row: the axis.
      stack: the axes that operand and indices share, element by element.
      params: the equation's own parameters.
    """

    row: int
    stack: tuple[int, ...]
    params: dict[str, Any]

    @property
    def offset(self) -> tuple[int, ...]:
        """Where the operand's axes that are kept lie in the result."""
        return tuple(map(int, self.params["dimension_numbers"].offset_dims))

    @property
    def kept(self) -> list[int]:
        """The operand's axes that are kept, in the order of `offset`."""
        gone = (*self.params["dimension_numbers"].collapsed_slice_dims, *self.stack)
        return [n for n in range(len(self.params["slice_sizes"])) if n not in gone]


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
    return Pick(rows[0], stack, params)


def is_single(pick: Pick, indices: Array) -> bool:
    """Say whether one place is picked, as by `w[i]`, and not one for each of several."""
    return math.prod(indices.shape[:-1]) == 1 and indices.ndim == 1 + len(pick.stack)


def take(view: View, pick: Pick, indices: Array) -> View | None:
    """Pick from a weight, and from those of its factors that span the axis; the other stays.

    None where the weight and the indices share an axis that a factor does not span.
    """
    numbers = pick.params["dimension_numbers"]
    for factor in (view.a, view.b):
        if factor is not None and not all(spans(view, factor)[n] for n in pick.stack):
            return None
    at = list(map(int, numbers.start_index_map)).index(pick.row)
    shared = tuple(map(int, numbers.start_indices_batching_dims))
    once = [size if n in shared else 1 for n, size in enumerate(indices.shape[:-1])]
    ndim = indices.ndim - 1 + len(pick.offset)

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        is_weight = array.ndim == len(spanned)
        places = indices[..., at : at + 1] if spanned[pick.row] else jnp.zeros((*once, 1), indices.dtype)
        sizes = [size if there else 1 for size, there in zip(pick.params["slice_sizes"], spanned, strict=True)]
        rank = [] if is_weight else [array.shape[-1]]
        return lax.gather(
            array,
            places,
            lax.GatherDimensionNumbers(
                (*pick.offset, *range(ndim, ndim + len(rank))),
                tuple(map(int, numbers.collapsed_slice_dims)),
                (pick.row,),
                pick.stack,
                shared,
            ),
            (*sizes, *rank),
            indices_are_sorted=pick.params["indices_are_sorted"],
            unique_indices=pick.params["unique_indices"] and spanned[pick.row],
            mode=pick.params["mode"],
            # What is filled in is no weight, and gets no update.
            fill_value=pick.params["fill_value"] if is_weight else 0,
        )

    out = rename(view, act, labels(view, pick, ndim, shared))
    # Devices may pick different places.
    keeps = lambda f: f is None or not spans(view, f)[pick.row]
    return dataclasses.replace(out, uniform=uniform_where(view, keeps(view.a), keeps(view.b)))


def labels(view: View, pick: Pick, ndim: int, shared: Sequence[int]) -> list[Axes]:
    """Return the stored axes that each axis of a pick's result is made of."""
    kept = dict(zip(pick.offset, pick.kept, strict=True))
    batch = dict(zip(shared, pick.stack, strict=True))
    index_axes = iter(range(ndim))
    return [view.axes[kept[n] if n in kept else batch.get(next(index_axes), pick.row)] for n in range(ndim)]
