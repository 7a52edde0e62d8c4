"""The adapted product: data times `w + a b`, without forming that sum unless that is cheaper."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from rslora_jax.transform.views import RANK, View, compact


@dataclasses.dataclass(frozen=True)
class Spec:
    """A product of data and a weight as an einsum, one letter an axis.

    Attributes:
      x, w, out: the letters of the data, the weight and the result.
      dtype: what the weight is cast to before the product.
      precision, preferred: as in `jax.lax.dot_general`.
      base: the program's own equation, from (data, weight) to result.
    """

    x: str
    w: str
    out: str
    dtype: Any
    precision: Any
    preferred: Any
    base: Callable[[Array, Array], Array]


def adapted_product(spec: Spec, x: Array, view: View) -> Array | None:
    """Return the product of `x` with an adapted weight, or None where it has no low-rank form."""
    a_letters, a = compact(view, view.a, spec.w)
    b_letters, b = compact(view, view.b, spec.w)
    contracted = set(spec.x) - set(spec.out)
    # Letters that only one factor has decide which of them the data meets first.
    only_a, only_b = set(a_letters) - set(b_letters), set(b_letters) - set(a_letters)
    if contracted & only_a and contracted & only_b:
        return None
    first, second = ((b_letters, b), (a_letters, a)) if contracted & only_b else ((a_letters, a), (b_letters, b))
    needed = set(spec.out) | set(second[0])
    between = "".join(dict.fromkeys(c for c in spec.x + first[0] if c in needed and c != RANK)) + RANK
    y = spec.base(x, view.base)

    def einsum(subscripts: str, left: Array, right: Array) -> Array:
        return jnp.einsum(subscripts, left, right, precision=spec.precision)

    xa = einsum(f"{spec.x},{first[0]}->{between}", x, first[1].astype(spec.dtype))
    delta = einsum(f"{between},{second[0]}->{spec.out}", xa, second[1].astype(spec.dtype))
    return y + delta.astype(y.dtype)
