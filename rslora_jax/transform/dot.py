"""A matrix product that an adapted weight takes part in: `dot_general`, written as an einsum."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform.contract import contract
from rslora_jax.transform.cost import Sizes
from rslora_jax.transform.product import Product
from rslora_jax.transform.views import LETTERS, RANK, View, alike, compact


@dataclasses.dataclass(frozen=True)
class _Dot:
    """A product of data and a weight; every axis has a letter.

    Attributes:
      x, w, out: the letters of the data, the weight and the result.
      first, between, second: those of the factor the data meets first, of that result, of the other factor.
      weight_left: whether the weight is the left operand.
      params: the equation's own parameters.
      dtype, gamma: what the program casts the weight to, and the adapter's scale.
      platform: what the program is compiled for.
    """

    x: str
    w: str
    out: str
    first: str
    between: str
    second: str
    weight_left: bool
    params: tuple[tuple[str, Any], ...]
    dtype: Any
    gamma: float
    platform: str

    rank_axis = 0

    def base(self, x: Array, w: Array) -> Array:
        operands = (w, x) if self.weight_left else (x, w)
        return lax.dot_general_p.bind(*operands, **dict(self.params))

    def by_weight(self, x: Array, w: Array) -> Array:
        return self.contract(f"{self.x},{self.w}->{self.out}", x, w, dict(self.params)["preferred_element_type"])

    def meet(self, x: Array, first: Array) -> Array:
        return self.contract(f"{self.x},{self.first}->{self.between}", x, first)

    def leave(self, xa: Array, second: Array) -> Array:
        return self.contract(f"{self.between},{self.second}->{self.out}", xa, second)

    def full(self, first: Array, second: Array) -> Array:
        return jnp.einsum(f"{self.first},{self.second}->{self.w}", *alike(first, second))

    def contract(self, subscripts: str, left: Array, right: Array, dtype: Any = None) -> Array:
        return contract(subscripts, left, right, dict(self.params)["precision"], dtype, self.platform)

    def sizes(self, x: tuple[int, ...], w: tuple[int, ...], rank: int) -> Sizes:
        size = dict(zip(self.x + self.w + RANK, (*x, *w, rank), strict=True))

        def count(*letters: str) -> int:
            return math.prod(size[c] for c in set("".join(letters)))

        return Sizes(
            base=2 * count(self.x, self.w),
            meet=2 * count(self.x, self.first),
            leave=2 * count(self.between, self.second),
            full=2 * count(self.first, self.second),
            kept_weight=count(self.w),
            kept_rows=count(self.between),
        )


def dot(view: View, x: Array, weight_left: bool, params: dict[str, Any], platform: str) -> Product | None:
    """Return how data meets a view in a product.

    None where it has no low-rank form: an axis of the weight that neither factor spans, or a gain along axes of which
    some are summed over and some are not.
    """
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    lhs, rhs = (view, x) if weight_left else (x, view)
    lhs_letters = LETTERS[: len(lhs.shape)]
    free_letters = iter(LETTERS[len(lhs.shape) :])
    paired = dict(zip((*rhs_contracted, *rhs_batch), (*lhs_contracted, *lhs_batch), strict=True))
    rhs_letters = "".join(lhs_letters[paired[n]] if n in paired else next(free_letters) for n in range(len(rhs.shape)))
    out_letters = "".join(
        [lhs_letters[n] for n in lhs_batch]
        + [c for n, c in enumerate(lhs_letters) if n not in (*lhs_batch, *lhs_contracted)]
        + [c for n, c in enumerate(rhs_letters) if n not in paired]
    )
    w_letters, x_letters = (lhs_letters, rhs_letters) if weight_left else (rhs_letters, lhs_letters)
    met = meeting(view, x_letters, w_letters, out_letters)
    gains = gains_of(view, x_letters, w_letters, out_letters)
    if met is None or gains is None:
        return None
    first, second, factors = met
    if factors:
        # The rank leads in the second factor, so that its gradient is formed as (x first)' dy, and not transposed.
        second, factors = RANK + second[:-1], (factors[0], jnp.moveaxis(factors[1], -1, 0))
    between = between_of(x_letters, first, set(out_letters) | set(second))
    own = tuple(params.items())
    op = _Dot(
        x_letters, w_letters, out_letters, first, between, second, weight_left, own, view.dtype, view.gamma, platform
    )
    return Product(op, factors, *gains)


def meeting(view: View, x: str, w: str, out: str) -> tuple[str, str, tuple[Array, ...]] | None:
    """Return the letters of the factor that data meets first, those of the other, and both arrays in this order.

    None where an axis of the weight is spanned by neither; without factors, empty.
    """
    if not view.factors:
        return "", "", ()
    (a_letters, a), (b_letters, b) = (compact(view, factor, w) for factor in view.factors)
    if not set(w) <= set(a_letters + b_letters):
        return None
    contracted = set(x) - set(out)
    if contracted & (set(b_letters) - set(a_letters)):
        return b_letters, a_letters, (b, a)
    return a_letters, b_letters, (a, b)


def between_of(x: str, first: str, needed: set[str]) -> str:
    """Return the letters of what data and the first factor make: those that are needed later, and the rank's."""
    return "".join(dict.fromkeys(c for c in x + first if c in needed and c != RANK)) + RANK


def gains_of(view: View, x: str, w: str, out: str) -> tuple[Array | None, Array | None] | None:
    """Return a view's gain as what its data and its result are multiplied by; None where it is neither."""
    if view.gain is None:
        return None, None
    letters, gain = compact(view, view.gain, w)
    for n, term in enumerate((out, x)):
        if set(letters) <= set(term):
            order = [letters.index(c) for c in term if c in letters]
            sizes = [gain.shape[letters.index(c)] if c in letters else 1 for c in term]
            shaped = jnp.reshape(jnp.transpose(gain, order), sizes)
            return (None, shaped) if n == 0 else (shaped, None)
    return None
