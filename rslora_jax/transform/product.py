"""The adapted product: data times `w + a b`, in the order of contractions that costs least.

The value and its derivative are chosen apart (`cost.plan`). The derivative is given as a forward rule that
is linear in the tangents, so both modes of differentiation work, and reverse mode transposes it into the
products that the plan has counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from rslora_jax.stored.form import dense, is_stored, on_device
from rslora_jax.transform import compat
from rslora_jax.transform.contract import apart, gradient_apart, rank_first
from rslora_jax.transform.cost import Plan, Sizes, plan
from rslora_jax.transform.dropout import dropped
from rslora_jax.transform.explicit import by_compiler, explicit_mesh, type_of
from rslora_jax.transform.views import View, common, wide

# The names by which checkpoint policies know what is kept from the value for its gradients: the weight with its
# update, and the data that met the first factor.
MERGED, MET = "rslora_merged_weight", "rslora_met"


class Bilinear(Protocol):
    """An operation on data and a weight that its two factors can take the place of, one after the other.

    `leave(meet(x, first), second)` is `base(x, full(first, second))`. Operations are compared by value: equal ones on
    equal shapes are traced once, however many layers a model has.
    """

    @property
    def dtype(self) -> Any:
        """What the program casts the weight to."""

    @property
    def gamma(self) -> float:
        """The adapter's scale, which the operations leave out."""

    @property
    def platform(self) -> str:
        """What the program is compiled for."""

    @property
    def rank_axis(self) -> int:
        """The axis of the rank in the second factor; in the first it is the last."""

    @property
    def base(self) -> Callable[..., Array]:
        """The program's own operation, (x, w, *extra), linear in each operand."""

    @property
    def by_weight(self) -> Callable[..., Array]:
        """The same function, in the form whose transpose in the weight costs least."""

    @property
    def meet(self) -> Callable[..., Array]:
        """The product of the data and the first factor, (x, first, *extra)."""

    @property
    def leave(self) -> Callable[..., Array]:
        """The product of that and the second factor, (met, second, *extra)."""

    @property
    def full(self) -> Callable[..., Array]:
        """The product of both factors, (first, second): the update without its scale."""

    @property
    def sizes(self) -> Callable[..., Sizes]:
        """The sizes that decide the order, (shape of x, shape of w, rank)."""

    def __hash__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight that meets data: the operation, and what of the adapter takes part in it.

    Attributes:
      op: the operation.
      factors: the two factors in the order in which the data meets them, the rank last; none without an update.
      before, after: the gain, in a shape that the data, or the result, can be multiplied by; of the two at most one.
    """

    op: Bilinear
    factors: tuple[Array, ...]
    before: Array | None = None
    after: Array | None = None


def adapted(view: View, product: Product, x: Array, *extra: Array) -> Array:
    """Return the result of data and what a view stands for.

    Args:
      view: the weight.
      product: how data meets it.
      x: the data.
      *extra: operands of the operation that have no derivative.
    """
    x = times(x, product.before)
    seen = dropped(view, x)
    drawn = () if seen is None else (seen,)
    return times(adapted_product(product.op, x, view.w, product.factors, extra, *drawn), product.after)


def factored(view: View, product: Product, x: Array, *extra: Array) -> Array:
    """Return what `adapted` does with its arguments, without a sum of the weight and its update whatever that costs."""
    x = times(x, product.before)
    seen = dropped(view, x)
    apart = x if seen is None else seen
    return times(adapted_product(product.op, x, view.w, product.factors, extra, apart), product.after)


def times(array: Array, gain: Array | None) -> Array:
    """Multiply by a gain, in the gain's dtype at least; the result has the array's."""
    if gain is None:
        return array
    dtype = wide(array.dtype, gain.dtype)
    return (array.astype(dtype) * gain.astype(dtype)).astype(array.dtype)


@functools.partial(jax.jit, static_argnums=0)
def adapted_product(
    op: Bilinear, x: Array, w: Any, factors: tuple[Array, ...], extra: tuple[Array, ...] = (), seen: Array | None = None
) -> Array:
    """Return the result of `op` on data and an adapted weight.

    Args:
      op: the operation.
      x: the data.
      w: the weight in the dtype or in the form it is stored in.
      factors: in the order in which the data meets them, the rank last. They are cast to
        the operation's dtype where they meet data; their sum with the weight is formed before that cast.
      extra: operands of `op` that have no derivative.
      seen: the data as the adapter sees it, where that is not `x`; then all is factored.
    """
    if explicit_mesh(x, w):
        return _without_explicit_axes(op, x, w, factors, extra, seen)
    stored = is_stored(w)
    # A sum with a weight stored in fewer bits than float32 would round the update away.
    parts = Parts(op, jnp.finfo(w.dtype).bits >= 32, extra)
    if not factors:
        return _recomputed(parts.base, stored)(x, w)
    first, second = factors
    sizes = op.sizes(x.shape, w.shape, first.shape[-1])
    # Through a weight that the program computes with in float8, an update would be rounded to three bits.
    best = plan(sizes, parts.summable) if jnp.finfo(op.dtype).bits >= 16 and seen is None else Plan()
    # The order is that of a dense weight, to the bit, but a weight that is not kept dense is not kept in a sum either.
    best = dataclasses.replace(best, keep=False) if stored else best

    first = first if _slight(first.shape, -1, sizes.meet) else rank_first(first, -1, op.platform)
    second = (
        second if _slight(second.shape, op.rank_axis, sizes.leave) else rank_first(second, op.rank_axis, op.platform)
    )

    if best == Plan():  # then JAX's own derivative is the one that was counted
        return _recomputed(parts.factored, stored)(x, w, first, second, seen)
    return _through_weight(op, best, x, w, first, second, extra)


def _recomputed(act: Callable[..., Array], stored: bool) -> Callable[..., Array]:
    """Return a product that, where the weight is stored in a form of its own, keeps no dense one for its gradients."""
    if not stored and not compat.op_by_op():  # in which all bases' gradients are summed in one order, to the bit
        return act
    return jax.checkpoint(act, policy=jax.checkpoint_policies.save_only_these_names(MET))


def _through_weight(op: Bilinear, best: Plan, x: Array, w: Any, first: Array, second: Array, extra: Any) -> Array:
    """Return the product by a plan in which some part goes through the sum of the weight and its update."""
    summable = jnp.finfo(w.dtype).bits >= 32

    # `extra` is an argument and not a closure: JAX traces the rule later, when values of this trace are gone.
    @jax.custom_jvp
    def product(x: Array, w: Any, first: Array, second: Array, *extra: Array) -> Array:
        parts = Parts(op, summable, extra)
        return parts.merged(w, first, second)(x) if best.value_alone else parts.factored(x, w, first, second)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Array, Array]:
        x, w, first, second, *extra = primals
        dx, dfirst, dsecond = (None if isinstance(t, SymbolicZero) else t for t in (tangents[0], *tangents[2:4]))
        dw = _tangent_of_dense(w, tangents[1])
        parts = Parts(op, summable, extra)
        whole: Any = parts.merged(w, first, second) if best.forward or best.dx else None
        met = _kept_as(parts.meet(x, first), MET)  # XLA drops what is not used
        y = whole(x) if best.forward else parts.with_update(parts.base(x, w), met, second)
        terms = []
        if best.factors:
            weights = [] if dfirst is None else [parts.full(dfirst, second)]
            weights += [] if dsecond is None else [parts.full(first, dsecond)]
            if weights:
                terms.append(parts.by_weight(x, _add(weights)))
        else:
            meets = [parts.meet(x, dfirst)] if dfirst is not None else []
            if dx is not None and not best.dx:
                meets.append(parts.meet(dx, first))
            if meets:
                terms.append(parts.leave(_add(meets), second))
            if dsecond is not None:
                terms.append(parts.leave(met, dsecond))
        if dx is not None:
            terms.append(whole(dx) if best.dx else parts.base(dx, w))
            if best.factors and not best.dx:
                terms.append(parts.leave(parts.meet(dx, first), second))
        if dw is not None:
            terms.append(parts.by_weight(x, dw))
        dy = _add([t.astype(y.dtype) for t in terms]) if terms else jnp.zeros_like(y)
        return y, dy

    product.defjvp(rule, symbolic_zeros=True)
    kept = [MERGED] * best.keep + [MET] * (not best.forward and not best.factors)
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(product, policy=policy)(x, w, first, second, *extra)


def _tangent_of_dense(w: Any, tangent: Any) -> Array | None:
    """Return the tangent of the array that a weight stands for; None where it has none."""
    tree: Any = jax.tree.structure(w)
    given = jax.tree.leaves(tangent, is_leaf=lambda t: isinstance(t, SymbolicZero))
    if all(isinstance(t, SymbolicZero) for t in given):
        return None
    if not is_stored(w):
        return tangent
    tangents = [
        _zero_of(array) if isinstance(t, SymbolicZero) else t
        for array, t in zip(tree.flatten_up_to(w), given, strict=True)
    ]
    return jax.jvp(dense, (w,), (jax.tree.unflatten(tree, tangents),))[1]


def _zero_of(array: Array) -> Any:
    """Return the zero tangent of an array; that of integers has a dtype that only numpy has."""
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def _without_explicit_axes(op: Any, x: Array, w: Any, factors: Any, extra: Any, seen: Any) -> Array:
    """Return the product where an array's type says how it lies: its result lies as the program's own does."""
    where = type_of(lambda x, w: Parts(op, True, extra).base(x, w), x, w).sharding
    if hasattr(op, "params"):
        op = dataclasses.replace(op, params=tuple((k, None if k == "out_sharding" else v) for k, v in op.params))
    return by_compiler(functools.partial(adapted_product, op), where, x, w, factors, extra, seen)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a product is made of: an operation with its scale and its casts, and the operands without derivative."""

    op: Bilinear
    summable: bool
    extra: Sequence[Array]

    def cast(self, weight: Any) -> Array:
        """Return a weight as the array that the program computes with."""
        return dense(weight).astype(self.op.dtype)

    def cast_factor(self, factor: Array) -> Array:
        """Return a factor in the dtype in which data meet it."""
        return factor.astype(common(self.op.dtype))

    def base(self, x: Array, w: Any) -> Array:
        """Return the product with the weight alone."""
        if is_stored(w) and hasattr(self.op, "of_stored"):
            found = self.op.of_stored(x, w)
            if found is not None:
                return found
        return self.alone(lambda x, w: self.op.base(x, self.cast(w), *self.extra), x, w)

    def alone(self, act: Callable[..., Array], x: Array, w: Any, *others: Array) -> Array:
        """Return a product in which a weight becomes dense, on a CPU in a branch of its own.

        XLA on CPUs drops the barriers of a remat: it would make one dense weight for a product and its gradients, and
        all of a program's at its start, since they wait for nothing. A branch waits for the data that meets the weight.
        """
        w = on_device(w)
        arrays = [array for array in jax.tree.leaves(w) if array.size]
        # In a `shard_map` the branches would have to vary over the mesh alike.
        in_shard_map = any(map(compat.varying, (x, *arrays, *others)))
        if not is_stored(w) or self.op.platform != "cpu" or not arrays or compat.op_by_op() or in_shard_map:
            return act(x, w, *others)
        always = ~(arrays[0][(0,) * arrays[0].ndim].astype(jnp.float32) > jnp.inf)  # which XLA does not know
        out = jax.eval_shape(act, x, w, *others)

        def never(*operands: Any) -> Array:
            return jnp.zeros(out.shape, out.dtype)

        return lax.cond(always, jax.checkpoint(act), never, x, w, *others)

    def by_weight(self, x: Array, dw: Array) -> Array:
        """Return the product with a change of the weight, to be transposed in it."""
        return self.op.by_weight(x, self.cast(dw), *self.extra)

    def meet(self, x: Array, first: Array) -> Array:
        """Return the product with the first factor, times the scale."""
        return self.op.gamma * self.op.meet(
            apart(x, first.shape[-1], self.op.platform), self.cast_factor(first), *self.extra
        )

    def leave(self, xa: Array, second: Array) -> Array:
        """Return the product with the second factor."""
        return self.op.leave(xa, self.cast_factor(second), *self.extra)

    def full(self, first: Array, second: Array) -> Array:
        """Return the update of the weight."""
        return self.op.full(first, self.op.gamma * second)

    def factored(self, x: Array, w: Any, first: Array, second: Array, seen: Array | None = None) -> Array:
        """Return the product; `seen` is the data that the factors meet, if it is other than the weight's."""
        met = self.meet(x if seen is None else seen, first)
        return self.with_update(self.base(x, w), _kept_as(met, MET) if is_stored(w) else met, second)

    def with_update(self, y: Array, met: Array, second: Array) -> Array:
        """Return the product with the weight and that with the second factor in one."""
        update = gradient_apart(self.leave(met, second), second.shape[self.op.rank_axis], self.op.platform)
        return y + update.astype(y.dtype)

    def merged(self, w: Any, first: Array, second: Array) -> Callable[[Array], Array]:
        """Return the product with the adapted weight as a function of the data."""
        if self.summable:
            dtype = wide(w.dtype, first.dtype, second.dtype)

            def total(w: Any, first: Array, second: Array) -> Array:
                update = self.full(first.astype(dtype), second.astype(dtype))
                return _kept_as(self.cast(dense(w).astype(dtype) + update), MERGED)

            if is_stored(w):
                return lambda x: self.alone(lambda x, *of: self.base(x, total(*of)), x, w, first, second)
            summed = total(w, first, second)
            return lambda x: self.base(x, summed)
        update = _kept_as(self.cast(self.full(first, second)), MERGED)
        return lambda x: self.base(x, w) + self.base(x, update)


def _slight(shape: tuple[int, ...], rank_axis: int, flops: int) -> bool:
    """Say whether the product that makes a factor's gradient has two axes, or the rows, of fewer than four places.

    Under vmap, the XLA of JAX 0.10 aborts on a CPU where it forms such a product transposed, as `rank_first` has it.
    """
    rank, *others = (shape[rank_axis], *(n for axis, n in enumerate(shape) if axis != rank_axis % len(shape)))
    rows = flops // (2 * math.prod(shape))
    return (isinstance(rows, int) and rows < 4) or (rank < 4 and min(others, default=0) < 4)


def _kept_as(array: Array, name: str) -> Array:
    """Name an array for checkpoint policies; a complex one by its parts, as JAX cannot keep it whole."""
    if not jnp.iscomplexobj(array):
        return checkpoint_name(array, name)
    return lax.complex(checkpoint_name(array.real, name), checkpoint_name(array.imag, name))


def _add(terms: list[Array]) -> Array:
    """Add arrays without starting from a zero."""
    total, *rest = terms
    for term in rest:
        total = total + term
    return total
