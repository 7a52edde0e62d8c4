"""A weight view: a base weight on its way to its use, with what its adapter is made of carried along.

Renaming a weight (transposing, reshaping, slicing it) commutes with adding A B to it as long as the
axes that A spans and those that B spans stay apart. So a view holds the weight and the arrays of its adapter, and
every renaming acts on all of them. This file is the one place that says what acts in place of W.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.stored.form import dense, is_stored
from rslora_jax.transform.explicit import by_compiler, explicit_mesh, type_of_weight

Axes = frozenset[tuple[str, int]]

RANK = "Z"  # the rank's letter in every einsum of the transform
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"


STATIC = {"static": True}  # of a field that is no array: it is compared, and never traced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A base weight `w` that stands for `gain * (w + gamma (sum over the rank of the factors' product))`.

    The arrays of the adapter are aligned with `w`: they have its axes, at full size where they span them and at size
    1 where they do not, and then, if any, axes of their own. A stack axis is spanned by all of them.

    Attributes:
      w: the base weight, in the layout it has at this point of the program: an array, or `Stored`.
      axes: for each axis of `w`, the (path, axis) pairs of the stored parameters that it is made of.
      dtype: what the program has cast the weight to. `w` keeps its stored dtype, so that a sum with
        the factors can be formed before it is rounded.
      sites: the paths of the parameters it is made of: one, unless the program concatenates weights. None in
        discovery for a value that depends neither on data nor on a weight, and of a stored weight without adapter.
      factors: the two factors A and B, aligned, with the rank behind; none where the weight has no update.
      gamma: the scale. It is multiplied with what has the rank for an axis and is small, never with B itself:
        a scaled copy of every B would live through the step.
      gain: what the sum is multiplied by, aligned; None is one.
      along: named arrays that go with the weight along its stack, each element's to its place: "mask", the data of a
        random key, and "meter", what takes readings (see `analysis.stability`).
      rate: with a mask, the part of the data that the adapter does not see.
      uniform: inside a shard_map, for each of `parts`, the mesh axes along which all devices are known to have the
        same.
      uses: of a tied weight whose uses are adapted each for itself, what of the parts is whose (`transform/uses.py`).
    """

    w: Any  # Array, or Stored
    axes: tuple[Axes, ...] = dataclasses.field(metadata=STATIC)
    dtype: Any = dataclasses.field(metadata=STATIC)
    sites: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    factors: tuple[Array, ...] = ()
    gamma: float = dataclasses.field(default=1.0, metadata=STATIC)
    gain: Array | None = None
    along: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    rate: float = dataclasses.field(default=0.0, metadata=STATIC)
    uniform: tuple[frozenset[str], ...] = dataclasses.field(default=(), metadata=STATIC)
    uses: tuple[Any, ...] = dataclasses.field(default=(), metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the view stands for."""
        return self.w.shape

    @property
    def parts(self) -> tuple[Array, ...]:
        """The adapter's arrays: the factors, the gain, and what goes along, by name."""
        gain = () if self.gain is None else (self.gain,)
        return (*self.factors, *gain, *(self.along[name] for name in sorted(self.along)))

    def with_parts(self, w: Any, parts: Sequence[Any], **changes: Any) -> "View":
        """Return the view with another array for the weight and for each of its parts."""
        left = iter(parts)
        factors = tuple(next(left) for _ in self.factors)
        gain = None if self.gain is None else next(left)
        along = {name: next(left) for name in sorted(self.along)}
        return dataclasses.replace(self, w=w, factors=factors, gain=gain, along=along, **changes)

    @property
    def shared(self) -> tuple[frozenset[str], ...]:
        """`uniform`, for each part."""
        return self.uniform or (frozenset(),) * len(self.parts)

    @property
    def stacked(self) -> bool:
        """Whether the leading axis is a stack: the weight and all parts have it."""
        return (not is_stored(self.w) or bool(self.w.stack)) and all(spans(self, part)[0] for part in self.parts)

    @property
    def base(self) -> Array:
        """The weight without its adapter, as the unadapted program sees it."""
        w = dense(self.w)
        return w if w.dtype == self.dtype else w.astype(self.dtype)


def wide(*dtypes: Any) -> Any:
    """Return the dtype in which numbers of some dtypes are summed: that of all, and no narrower than float32.

    JAX's own promotion refuses float8, and under strict promotion all of it.
    """
    kinds = [jnp.dtype("float32") if jnp.finfo(d).bits < 32 else d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    return functools.reduce(np.promote_types, kinds, np.dtype("float32"))


def common(*dtypes: Any) -> Any:
    """Return the dtype in which data meets a factor: their own, but none of fewer than 16 bits."""
    inexact = [jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    kinds = {jnp.dtype("bfloat16") if jnp.finfo(d).bits < 16 else d for d in inexact}
    return kinds.pop() if len(kinds) == 1 else wide(*kinds)


def alike(*arrays: Array) -> list[Array]:
    """Return arrays in the one dtype in which they meet."""
    dtype = common(*(array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]


def spans(view: View, part: Any) -> tuple[bool, ...]:
    """Say for each axis of the weight whether a part spans it."""
    return tuple(n == m for n, m in zip(view.shape, part.shape, strict=False))


def compact(view: View, part: Array, letters: str) -> tuple[str, Array]:
    """Drop the axes a part does not span; return the letters of the others and the array.

    The letters of a factor, whose last axis is the rank, end with the rank's.
    """
    spanned = spans(view, part)
    gone = [n for n, s in enumerate(spanned) if not s]
    own = RANK if part.ndim > len(spanned) else ""
    return "".join(c for c, s in zip(letters, spanned, strict=True) if s) + own, jnp.squeeze(part, gone)


def _update(view: View) -> Array:
    """Return gamma A B in the layout of the weight, in the dtype in which it is summed with it."""
    letters = LETTERS[: len(view.shape)]
    dtype = wide(view.w.dtype, *(factor.dtype for factor in view.factors))
    (a, a_array), (b, b_array) = (compact(view, factor, letters) for factor in view.factors)
    a_array, b_array = a_array.astype(dtype), b_array.astype(dtype)

    def form(a_array: Array, b_array: Array) -> Array:
        return jnp.einsum(f"{a},{b}->{letters}", a_array, view.gamma * b_array)

    if explicit_mesh(view.w):
        return by_compiler(form, type_of_weight(view.w).sharding, a_array, b_array)
    return form(a_array, b_array)


def materialise(view: View | Array) -> Array:
    """Return what a view stands for as one array: summed in at least float32, then cast as the program casts."""
    if not isinstance(view, View):  # a value that takes the weight's place
        return view
    if not view.factors and view.gain is None:
        return view.base
    w = dense(view.w)
    total, there = w, jax.typeof(w).memory_space
    if view.factors:
        delta = _update(view)
        here = jax.typeof(delta).memory_space
        total = (w if here == there else jax.device_put(w, here)).astype(delta.dtype) + delta
    if view.gain is not None:
        dtype = wide(total.dtype, view.gain.dtype)
        total = total.astype(dtype) * view.gain.astype(dtype)
    total = total.astype(view.dtype)
    return total if jax.typeof(total).memory_space == there else jax.device_put(total, there)
