"""A look-up in an adapted table: rows of one factor are picked, and meet the other."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from rslora_jax.stored.form import Stored, on_device
from rslora_jax.transform.cost import Sizes
from rslora_jax.transform.picks import Pick, picked, picked_gain
from rslora_jax.transform.product import Product
from rslora_jax.transform.views import LETTERS, RANK, View, alike, compact, spans


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """Rows picked from a table by indices; what is picked has a letter for each axis.

    Attributes:
      pick: which axis is indexed, and how.
      out: the letters of the result.
      first, second: those axes of it that the rows of the two factors have, and the rank's.
      whole: the table's letters, and those of the two factors.
      spans: which of the table's axes the two factors span.
      dtype, gamma: what the program casts the table to, and the adapter's scale.
      platform: what the program is compiled for.
    """

    pick: Pick
    out: str
    first: str
    second: str
    whole: tuple[str, str, str]
    spans: tuple[tuple[bool, ...], tuple[bool, ...]]
    dtype: Any
    gamma: float
    platform: str

    rank_axis = -1

    def base(self, indices: Array, w: Array) -> Array:
        fill = dict(self.pick.params)["fill_value"]
        return picked(w, indices, (True,) * w.ndim, self.pick, fill)

    by_weight = base

    def of_stored(self, indices: Array, w: Stored) -> Array | None:
        """Return the rows of a stored table, of which no others become dense; None where its form cannot give them."""
        p = dict(self.pick.params)
        if w.stack or self.pick.stack or self.pick.row != 0 or p["slice_sizes"][0] != 1:
            return None
        numbers = jnp.arange(w.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (w.ndim - 1))
        places = picked(numbers, indices, (True,) + (False,) * (w.ndim - 1), self.pick, -1)
        places = jnp.squeeze(places, self.pick.offset)
        rows = on_device(w).rows(jnp.maximum(places.reshape(-1), 0))
        if rows is None:
            return None
        fill = jnp.nan if p["fill_value"] is None else p["fill_value"]
        there = places.reshape(-1, *(1,) * (w.ndim - 1)) >= 0
        rows = jnp.where(there, rows.astype(self.dtype), jnp.asarray(fill, self.dtype)).reshape(
            *places.shape, *rows.shape[1:]
        )
        if 0 in self.pick.kept:  # an axis of one row is left
            rows = jnp.expand_dims(rows, places.ndim)
        return jnp.moveaxis(rows, range(places.ndim, rows.ndim), self.pick.offset)

    def meet(self, indices: Array, first: Array) -> Array:
        rows = picked(self.aligned(first, 0), indices, self.spans[0], self.pick, 0)
        return jnp.squeeze(rows, [n for n, c in enumerate(self.out) if c not in self.first])

    def leave(self, met: Array, second: Array) -> Array:
        return jnp.einsum(f"{self.first},{self.second}->{self.out}", *alike(met, second))

    def full(self, first: Array, second: Array) -> Array:
        table, one, other = self.whole
        return jnp.einsum(f"{one},{other}->{table}", *alike(first, second))

    def aligned(self, factor: Array, which: int) -> Array:
        """Return a factor with the axes of the table, of size 1 where it does not span them."""
        return jnp.expand_dims(factor, [n for n, there in enumerate(self.spans[which]) if not there])

    def sizes(self, indices: tuple[int, ...], w: tuple[int, ...], rank: int) -> Sizes:
        rows = math.prod(indices[:-1])
        gone = (self.pick.row, *self.pick.stack)
        kept = math.prod(n for axis, n in enumerate(w) if axis not in gone)
        own = math.prod(n for axis, n in enumerate(w) if self.spans[0][axis] and axis not in gone)
        whole = math.prod(w)
        return Sizes(0, 0, 2 * rows * rank * kept, 2 * rank * whole, whole, rows * rank * own)


def lookup(view: View, pick: Pick, indices: Array, platform: str) -> Product | None:
    """Return how indices meet a view as a table; None where a factor is not picked alone."""
    letters, table = LETTERS[: pick.ndim(indices)], LETTERS[: len(view.shape)]
    index_axes = [n for n in range(len(letters)) if n not in pick.offset]
    of = {axis: letters[at] for axis, at in zip(pick.kept, pick.offset, strict=True)}
    of |= {axis: letters[index_axes[n]] for n, axis in pick.batch.items()}
    after = picked_gain(view, indices, pick)
    if not view.factors:
        op = _Lookup(pick, letters, "", "", (table, "", ""), ((), ()), view.dtype, view.gamma, platform)
        return Product(op, (), None, after)
    spanned = [spans(view, factor) for factor in view.factors]
    which = [n for n, there in enumerate(spanned) if there[pick.row]]
    if len(which) != 1 or not all(there[n] for there in spanned for n in pick.stack):
        return None
    order = (which[0], 1 - which[0])
    (whole_first, first), (whole_second, second) = (compact(view, view.factors[n], table) for n in order)
    rows = "".join(letters[n] for n in index_axes)
    op = _Lookup(
        pick,
        letters,
        "".join(c for c in letters if c in rows or c in [of[n] for n in pick.kept if spanned[order[0]][n]]) + RANK,
        "".join(of[n] for n in range(len(table)) if spanned[order[1]][n]) + RANK,
        (table, whole_first, whole_second),
        (spanned[order[0]], spanned[order[1]]),
        view.dtype,
        view.gamma,
        platform,
    )
    return Product(op, (first, second), None, after)
