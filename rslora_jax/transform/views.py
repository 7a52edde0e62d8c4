"""A weight view: a base weight on its way to its use, with its two factors carried along.

Renaming a weight (transposing, reshaping, slicing it) commutes with adding A B to it as long as the
axes that A spans and those that B spans stay apart. So a view holds the weight and both factors, and
every renaming acts on all three.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.transform.explicit import by_compiler, explicit_mesh

Axes = frozenset[tuple[str, int]]

RANK = "Z"  # the rank's letter in every einsum of the transform
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"


@dataclasses.dataclass(frozen=True)
class Past:
    """What discovery remembers of a weight on its way; by default, that it was only renamed and scaled.

    Attributes:
      through: the first operation without a rule that it went through.
      met: the operation in which it met data entry by entry, and kept its axes (a mask, a choice).
      rows: whether rows of it were picked: to what comes next they are data, unless data meet them in a product.
      copies: whether the data that it met lack one of its axes, so that each row of data has a weight of its own.
      summed: the stored axes that products with other weights have summed over.
      mapped: the stored axes that a constant on its left has mapped to others.
      resized: whether a constant has mapped an axis of it, on whichever side.
      waiting: the uses, by number, that do not count if it serves as a weight later.
    """

    through: str = ""
    met: str = ""
    rows: bool = False
    copies: bool = False
    summed: Axes = frozenset()
    mapped: Axes = frozenset()
    resized: bool = False
    waiting: frozenset[int] = frozenset()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A base weight `w` that stands for `w + gamma (sum over the rank of a * b)`.

    The factors are aligned with `w`: they have its axes, at full size where they span them and at size
    1 where they do not, and then the rank. A stack axis is spanned by both.

    Attributes:
      w: the base weight, in the layout it has at this point of the program.
      a: the factor A, aligned; None while sites are being discovered.
      b: the factor B, aligned; None while sites are being discovered.
      axes: for each axis of `w`, the (path, axis) pairs of the stored parameters that it is made of.
      dtype: what the program has cast the weight to. `w` keeps its stored dtype, so that a sum with
        the factors can be formed before it is rounded.
      sites: the paths of the parameters it is made of: one, unless the program concatenates weights.
        None in discovery, for a value that depends neither on data nor on a weight.
      gamma: the scale. It is multiplied with what has the rank for an axis and is small, never with `b` itself:
        a scaled copy of every B would live through the step.
      uniform: inside a shard_map, the mesh axes along which all devices are known to have the same `a`, and `b`.
      past: what discovery remembers of it.
    """

    w: Array
    a: Any  # Array, or None
    b: Any
    axes: tuple[Axes, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    sites: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    gamma: float = dataclasses.field(default=1.0, metadata={"static": True})
    uniform: tuple[frozenset[str], frozenset[str]] = dataclasses.field(
        default=(frozenset(), frozenset()), metadata={"static": True}
    )
    past: Past = dataclasses.field(default=Past(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def stacked(self) -> bool:
        """Whether the leading axis is a stack: both factors span it (or there are none yet)."""
        return all(f is None or spans(self, f)[0] for f in (self.a, self.b))

    @property
    def base(self) -> Array:
        """The weight without its adapter, as the unadapted program sees it."""
        return self.w if self.w.dtype == self.dtype else self.w.astype(self.dtype)


def one_past(views: Sequence[View]) -> Past:
    """Return what is remembered of a value that is made of several weights."""
    pasts = [v.past for v in views]
    return Past(
        next((p.through for p in pasts if p.through), ""),
        next((p.met for p in pasts if p.met), ""),
        any(p.rows for p in pasts),
        any(p.copies for p in pasts),
        frozenset().union(*(p.summed for p in pasts)),
        frozenset().union(*(p.mapped for p in pasts)),
        any(p.resized for p in pasts),
        frozenset().union(*(p.waiting for p in pasts)),
    )


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


def spans(view: View, factor: Array) -> tuple[bool, ...]:
    """Say for each axis of the weight whether a factor spans it."""
    return tuple(n == m for n, m in zip(view.w.shape, factor.shape, strict=False))


def compact(view: View, factor: Array, letters: str) -> tuple[str, Array]:
    """Drop the axes a factor does not span; return its einsum subscripts and the array."""
    spanned = spans(view, factor)
    gone = [n for n, s in enumerate(spanned) if not s]
    return "".join(c for c, s in zip(letters, spanned, strict=True) if s) + RANK, jnp.squeeze(factor, gone)


def update(view: View) -> Array:
    """Return gamma A B in the layout of the weight, in the dtype in which it is summed with it."""
    letters, dtype = LETTERS[: len(view.shape)], wide(view.w.dtype, view.a.dtype, view.b.dtype)
    (a, a_array), (b, b_array) = (compact(view, f, letters) for f in (view.a, view.b))
    a_array, b_array = a_array.astype(dtype), b_array.astype(dtype)
    form = lambda a_array, b_array: jnp.einsum(f"{a},{b}->{letters}", a_array, view.gamma * b_array)
    if explicit_mesh(view.w):
        return by_compiler(form, jax.typeof(view.w).sharding, a_array, b_array)
    return form(a_array, b_array)


def materialise(view: View) -> Array:
    """Return `w + gamma A B` as one array: summed in at least float32, then cast as the program casts."""
    if view.a is None:
        return view.base
    delta = update(view)
    here, there = (jax.typeof(array).memory_space for array in (delta, view.w))
    w = view.w if here == there else jax.device_put(view.w, here)
    total = (w.astype(delta.dtype) + delta).astype(view.dtype)
    return total if here == there else jax.device_put(total, there)
