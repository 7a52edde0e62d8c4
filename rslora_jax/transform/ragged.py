"""A ragged product that adapted experts take part in: every run of rows meets its own expert's factors."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.cost import Sizes
from rslora_jax.transform.dot import between_of, gains_of, meeting
from rslora_jax.transform.product import Product
from rslora_jax.transform.views import LETTERS, RANK, View, alike, spans


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """A `ragged_dot_general` of data and a stack of experts; every axis has a letter.

    Attributes:
      x, w, out: the letters of the data, the experts and the result.
      first, between, second: those of the factor the data meets first, of that result, of the other factor.
      rows, group: the letter of the data's ragged axis, and that of the experts.
      params: the equation's own parameters.
      dtype, gamma: what the program casts the experts to, and the adapters' scale.
      platform: what the program is compiled for.
    """

    x: str
    w: str
    out: str
    first: str
    between: str
    second: str
    rows: str
    group: str
    params: tuple[tuple[str, Any], ...]
    dtype: Any
    gamma: float
    platform: str

    rank_axis = -1

    def base(self, x: Array, w: Array, group_sizes: Array) -> Array:
        p = dict(self.params)
        numbers, options = p["ragged_dot_dimension_numbers"], ("precision", "preferred_element_type", "out_sharding")
        return lax.ragged_dot_general(x, w, group_sizes, numbers, **{name: p[name] for name in options})

    by_weight = base

    def meet(self, x: Array, first: Array, group_sizes: Array) -> Array:
        return self.product(x, self.x, first, self.first, self.between, group_sizes)

    def leave(self, xa: Array, second: Array, group_sizes: Array) -> Array:
        return self.product(xa, self.between, second, self.second, self.out, group_sizes)

    def product(self, x: Array, x_letters: str, w: Array, w_letters: str, out: str, group_sizes: Array) -> Array:
        shared = [c for c in x_letters if c in w_letters]
        batch, contracted = [c for c in shared if c in out], [c for c in shared if c not in out]

        def at(letters: Sequence[str], wanted: Iterable[str]) -> tuple[int, ...]:
            return tuple(letters.index(c) for c in wanted)

        numbers = lax.RaggedDotDimensionNumbers(
            ((at(x_letters, contracted), at(w_letters, contracted)), (at(x_letters, batch), at(w_letters, batch))),
            at(x_letters, self.rows),
            at(w_letters, self.group),
        )
        x, w = alike(x, w)
        y = lax.ragged_dot_general(x, w, group_sizes, numbers, dict(self.params)["precision"])
        free = [c for c in x_letters if c not in shared] + [c for c in w_letters if c not in shared and c != self.group]
        return jnp.transpose(y, at([*batch, *free], out))

    def full(self, first: Array, second: Array) -> Array:
        return jnp.einsum(f"{self.first},{self.second}->{self.w}", *alike(first, second))

    def sizes(self, x: tuple[int, ...], w: tuple[int, ...], rank: int) -> Sizes:
        size = dict(zip(self.x + self.w + RANK, (*x, *w, rank), strict=True))

        def count(letters: str) -> int:
            return math.prod(size[c] for c in set(letters))

        def met(*letters: str) -> int:  # a row meets one expert
            return 2 * count("".join(letters).replace(self.group, ""))

        return Sizes(
            base=met(self.x, self.w),
            meet=met(self.x, self.first),
            leave=met(self.between, self.second),
            full=2 * count(self.first + self.second),
            kept_weight=count(self.w),
            kept_rows=count(self.between),
        )


def ragged(view: View, x: Array, params: dict[str, Any], sizes: Array, platform: str) -> Product | None:
    """Return how the rows of data meet a view, of whose experts each has the next `sizes` rows."""
    numbers = params["ragged_dot_dimension_numbers"]
    (x_contracted, w_contracted), (x_batch, w_batch) = numbers.dot_dimension_numbers
    groups, rows = tuple(numbers.rhs_group_dimensions), tuple(numbers.lhs_ragged_dimensions)
    if params["group_offset"] is not None or len(groups) != 1 or rows[0] in (*x_contracted, *x_batch):
        return None
    x_letters = LETTERS[: x.ndim]
    free_letters = iter(LETTERS[x.ndim :])
    paired = dict(zip((*w_contracted, *w_batch), (*x_contracted, *x_batch), strict=True))
    w_letters = "".join(x_letters[paired[n]] if n in paired else next(free_letters) for n in range(len(view.shape)))
    group = w_letters[groups[0]]
    out_letters = "".join(
        [x_letters[n] for n in x_batch]
        + [c for n, c in enumerate(x_letters) if n not in (*x_batch, *x_contracted)]
        + [c for n, c in enumerate(w_letters) if n not in paired and c != group]
    )
    met = meeting(view, x_letters, w_letters, out_letters)
    if met is None:
        return None
    first, second, factors = met
    summed = {x_letters[n] for n in x_contracted}
    if factors and (summed & (set(second) - set(first)) or not (group in first and group in second)):
        return None
    gains = _gains_by_row(view, x_letters, w_letters, out_letters, x_letters[rows[0]], group, sizes, x.shape[rows[0]])
    if gains is None:
        return None
    between = between_of(x_letters, first, (set(out_letters) | set(second)) - {group})
    op = _Ragged(
        x_letters,
        w_letters,
        out_letters,
        first,
        between,
        second,
        x_letters[rows[0]],
        group,
        tuple(params.items()),
        view.dtype,
        view.gamma,
        platform,
    )
    return Product(op, factors, *gains)


def _gains_by_row(
    view: View, x: str, w: str, out: str, rows: str, group: str, sizes: Array, number: int
) -> tuple[Array | None, Array | None] | None:
    """Return a gain as what data and result are multiplied by, for each row that of its expert."""
    if view.gain is None:
        return None, None
    axis = w.index(group)
    if not spans(view, view.gain)[axis]:
        return gains_of(view, x, w, out)
    if sizes.ndim != 1:
        return None
    by_row = jnp.repeat(view.gain, sizes, axis, total_repeat_length=number)
    wide = dataclasses.replace(view, w=_like_rows(view, axis, number), gain=by_row)
    return gains_of(wide, x, w.replace(group, rows), out)


def _like_rows(view: View, axis: int, number: int) -> Any:
    """Return the shape that the experts would have if every row of data had its own."""
    return jax.ShapeDtypeStruct((*view.shape[:axis], number, *view.shape[axis + 1 :]), view.w.dtype)
