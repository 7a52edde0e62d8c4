"""A function as a program: traced once for each shape and each set of static arguments."""

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.stored.form import is_stored, like_dense
from rslora_jax.stored.qwix import is_weight, taken
from rslora_jax.transform import compat
from rslora_jax.transform.objects import change, changes, values_of, variables_of
from rslora_jax.transform.static import exact, exact_structure, hashable

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
_NUMBERS = (float, complex)
Trace = tuple[compat.Jaxpr, Any, list[Any]]


def is_array(leaf: Any) -> bool:
    """Say whether a leaf is an array or stands for one, as a stored weight does; a NumPy string is none."""
    return is_stored(leaf) or (isinstance(leaf, _ARRAYS) and not isinstance(leaf, str | bytes))


@dataclasses.dataclass(frozen=True)
class Static:
    """The part of a call that a trace depends on by value: two are equal where `key` is.

    Attributes:
      key: the structure of the arguments, which leaves are traced, and the exact values of the others.
      tree: the structure.
      traced: which leaves are traced.
      numbers: which of those are Python numbers, by their place among all leaves.
      fixed: the leaves that are not traced.
      stand_ins: references to what stood for the numbers while the function was traced.
    """

    key: Hashable
    tree: Any = dataclasses.field(compare=False)
    traced: tuple[bool, ...] = dataclasses.field(compare=False)
    numbers: Collection[int] = dataclasses.field(compare=False)
    fixed: list[Any] = dataclasses.field(compare=False)
    stand_ins: list[weakref.ref] = dataclasses.field(compare=False, default_factory=list)

    def leaves(self, arrays: Sequence[Any]) -> list[Any]:
        """Return all leaves of the call; `arrays` are those that are traced."""
        given, fixed = iter(arrays), iter(self.fixed)
        return [next(given) if traced else next(fixed) for traced in self.traced]


class Program:
    """The traces of one function; `jax.jit` keeps them.

    A Python float or complex number is traced, as `jax.jit` does it, and another number is no other trace. But it is
    static where the function must know it, as all else is that is no array, and as it is among the parameters. An
    int always is: where it says how long a loop is, the loop has no gradient without it.
    """

    def __init__(self, fn: Callable[..., Any]):
        def flat(static: Static, *arrays: Any) -> Any:
            leaves = static.leaves(arrays)
            static.stand_ins.extend(weakref.ref(leaves[n]) for n in static.numbers)
            params, args, kwargs = jax.tree.unflatten(static.tree, leaves)
            objects = variables_of((args, kwargs))
            before = values_of(objects)
            return fn(params, *args, **kwargs), changes(objects, before)

        flat.__name__ = flat.__qualname__ = getattr(fn, "__name__", type(fn).__name__)
        self.jitted = jax.jit(flat, static_argnums=0)
        self.knowing: set[Hashable] = set()  # the calls whose numbers the function must know
        self.lock = threading.RLock()

    def trace(self, params: Any, args: tuple, kwargs: dict) -> Trace:
        """Return (jaxpr, tree of what it returns, the arrays it takes: those of `params` come first)."""
        tree: Any
        leaves, tree = jax.tree.flatten((params, args, kwargs), is_leaf=is_weight)
        leaves = list(map(taken, leaves))
        first = tree.children()[0].num_leaves
        numbers = [n for n, leaf in enumerate(leaves) if n >= first and type(leaf) in _NUMBERS]
        known = _static(tree, leaves)
        if not numbers:
            return self._traced(known, leaves)
        unknown = _static(tree, leaves, numbers)
        with self.lock:  # or another thread's unfinished trace would seem to keep the numbers
            if unknown.key not in self.knowing:
                try:
                    return self._traced(unknown, leaves)
                except Exception:  # whatever it says: if not for the numbers, it is raised again below
                    pass
            found = self._traced(known, leaves)
            self.knowing.add(unknown.key)
        return found

    def _traced(self, call: Static, leaves: Sequence[Any]) -> Trace:
        arrays = [
            jnp.asarray(leaf) if n in call.numbers else leaf
            for n, (leaf, yes) in enumerate(zip(leaves, call.traced, strict=True))
            if yes
        ]
        jaxpr, out_tree = compat.trace(self.jitted, call, *map(like_dense, arrays))
        if _any_alive(call.stand_ins):
            raise ValueError("the function keeps a number for later, as a derivative rule that closes over it does")
        return compat.live(jaxpr), out_tree, arrays

    def returned(self, tree: Any, outs: list[Any], args: tuple, kwargs: dict) -> Any:
        """Return the function's result from its program's outputs; the NNX objects it was given change too."""
        out, changed = jax.tree.unflatten(tree, outs)
        change(variables_of((args, kwargs)), changed)
        return out


def _static(tree: Any, leaves: Sequence[Any], numbers: Collection[int] = ()) -> Static:
    """Return the static part of a call in which some leaves, `numbers`, are traced as arrays are."""
    traced = tuple(n in numbers or is_array(leaf) for n, leaf in enumerate(leaves))
    fixed = [leaf for leaf, yes in zip(leaves, traced, strict=True) if not yes]
    values = tuple(map(exact, fixed))
    for leaf, value in zip(fixed, values, strict=True):
        if not hashable(value):
            raise TypeError(
                f"an argument of type {type(leaf).__name__} is neither an array nor hashable, so the function "
                "cannot be traced with it: pass arrays, or values such as True, None or a string"
            )
    return Static((exact_structure(tree), traced, tuple(numbers), values), tree, traced, numbers, fixed)


def _any_alive(references: Sequence[weakref.ref]) -> bool:
    """Say whether something that was to live as long as a trace lives on, and not only until the next collection."""
    if all(reference() is None for reference in references):
        return False
    gc.collect()
    return any(reference() is not None for reference in references)
