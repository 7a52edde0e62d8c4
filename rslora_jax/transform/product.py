"""The adapted product: data times `w + a b`, in the order of contractions that costs least.

The value and its derivative are chosen apart (`cost.plan`). The derivative is given as a forward rule that
is linear in the tangents, so both modes of differentiation work, and reverse mode transposes it into the
products that the plan has counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from rslora_jax.transform.cost import Plan, Sizes, plan
from rslora_jax.transform.views import RANK, View, compact

MERGED = "rslora_merged_weight"  # the name by which a kept sum is known to checkpoint policies


@dataclasses.dataclass(frozen=True)
class Spec:
    """A product of data and a weight as an einsum, one letter an axis.

    Attributes:
      x, w, out: the letters of the data, the weight and the result.
      precision: as in `jax.lax.dot_general`.
      base: the program's own equation, from (data, weight) to result.
    """

    x: str
    w: str
    out: str
    precision: Any
    base: Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Factors:
    """A product's two factors as einsum operands: the data meets `first`, and that result `second`."""

    first: str
    second: str
    between: str
    first_is_a: bool


def order(spec: Spec, a_letters: str, b_letters: str) -> Factors | None:
    """Say which factor the data meets first, or None where it is contracted with both."""
    contracted = set(spec.x) - set(spec.out)
    meets_a = bool(contracted & (set(a_letters) - set(b_letters)))
    meets_b = bool(contracted & (set(b_letters) - set(a_letters)))
    if meets_a and meets_b:
        return None
    first, second = (b_letters, a_letters) if meets_b else (a_letters, b_letters)
    needed = set(spec.out) | set(second)
    between = "".join(dict.fromkeys(c for c in spec.x + first if c in needed and c != RANK)) + RANK
    return Factors(first, second, between, not meets_b)


def adapted_product(spec: Spec, x: Array, view: View) -> Array | None:
    """Return the product of `x` with an adapted weight, or None where it has no low-rank form.

    Args:
      spec: the product.
      x: the data.
      view: the weight; the factors are cast to its dtype where they meet the data, and their sum with the
        stored weight is formed before that cast.
    """
    a_letters, a = compact(view, view.a, spec.w)
    b_letters, b = compact(view, view.b, spec.w)
    how = order(spec, a_letters, b_letters)
    if how is None:
        return None
    sizes = dict(zip(spec.x + spec.w, (*x.shape, *view.shape), strict=True)) | {RANK: a.shape[-1]}
    # A sum with a weight stored in fewer bits than float32 would round the update away.
    summable = jnp.finfo(view.w.dtype).bits >= 32
    best = plan(Sizes.of(spec, how, sizes), summable)
    first, second = (a, b) if how.first_is_a else (b, a)

    def einsum(subscripts: str, left: Array, right: Array) -> Array:
        return jnp.einsum(subscripts, left, right, precision=spec.precision)

    def cast(factor: Array) -> Array:
        return factor.astype(view.dtype)

    def low_rank(xa: Array, second: Array) -> Array:
        return einsum(f"{how.between},{how.second}->{spec.out}", xa, cast(second))

    def meet(x: Array, first: Array) -> Array:
        return einsum(f"{spec.x},{how.first}->{how.between}", x, cast(first))

    def full(first: Array, second: Array) -> Array:
        return jnp.einsum(f"{how.first},{how.second}->{spec.w}", first, second)

    def merged(w: Array, first: Array, second: Array) -> Callable[[Array], Array]:
        """Return the product with the adapted weight as a function of the data."""
        if summable:
            total = checkpoint_name(cast(w + full(first, second)), MERGED)
            return lambda x: spec.base(x, total)
        update = checkpoint_name(cast(full(first, second)), MERGED)
        return lambda x: spec.base(x, cast(w)) + spec.base(x, update)

    def value(x: Array, w: Array, first: Array, second: Array, through: bool) -> Array:
        if through:
            return merged(w, first, second)(x)
        y = spec.base(x, cast(w))
        return y + low_rank(meet(x, first), second).astype(y.dtype)

    if best == Plan(best.value_alone) and not best.value_alone:  # then JAX's own derivative is the one that was counted
        return value(x, view.w, first, second, False)

    @jax.custom_jvp
    def product(x, w, first, second):
        return value(x, w, first, second, best.value_alone)

    def rule(primals, tangents):
        x, w, first, second = primals
        dx, dw, dfirst, dsecond = (None if isinstance(t, SymbolicZero) else t for t in tangents)
        whole: Any = merged(w, first, second) if best.forward or best.dx else None
        y = whole(x) if best.forward else value(x, w, first, second, False)
        terms = []
        if best.factors:
            weights = [] if dfirst is None else [full(dfirst, second)]
            weights += [] if dsecond is None else [full(first, dsecond)]
            if weights:
                terms.append(spec.base(x, cast(add(weights))))
        else:
            meets = [meet(x, dfirst)] if dfirst is not None else []
            if dx is not None and not best.dx:
                meets.append(meet(dx, first))
            if meets:
                terms.append(low_rank(add(meets), second))
            if dsecond is not None:
                terms.append(low_rank(meet(x, first), dsecond))
        if dx is not None:
            terms.append(whole(dx) if best.dx else spec.base(dx, cast(w)))
            if best.factors and not best.dx:
                terms.append(low_rank(meet(dx, first), second))
        if dw is not None:
            terms.append(spec.base(x, cast(dw)))
        dy = add([t.astype(y.dtype) for t in terms]) if terms else jnp.zeros_like(y)
        return y, dy

    product.defjvp(rule, symbolic_zeros=True)
    policy = jax.checkpoint_policies.save_only_these_names(MERGED) if best.keep else None
    return jax.checkpoint(product, policy=policy)(x, view.w, first, second)


def add(terms: list[Array]) -> Array:
    """Add arrays without starting from a zero."""
    total, *rest = terms
    for term in rest:
        total = total + term
    return total
