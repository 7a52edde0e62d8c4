"""What discovery notes of a program: the uses of its weights, and where they meet data without telling their axes.

A value is one of four things: *data* (a tracer), a *weight* (a view that is made of parameters alone), *rows* picked
from a weight, which are data unless data meet them in a product, or a *constant*, which depends on none of them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from rslora_jax.transform import compat
from rslora_jax.transform.probe import Probe


@dataclasses.dataclass(frozen=True)
class Use:
    """One way in which the program consumes a weight.

    Attributes:
      site: the weight's path.
      kind: "product", "lookup", "convolution", or "guessed" where the operation has no rule and sizes tell the axes.
      contracted, batch: the stored axes summed over (or indexed, in a look-up), and shared with the data.
      free: the stored axes left in the result.
      summed: the stored axes that a product with another weight has summed over before.
      eqn: the equation; it identifies the use in the jaxpr.
    """

    site: str
    kind: str
    contracted: frozenset[int]
    batch: frozenset[int]
    free: frozenset[int]
    eqn: compat.Eqn
    summed: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A place where a weight meets data in an operation of which its axes cannot be told.

    Attributes:
      operation: what it is called.
      primitive: it itself; None where there are several, or none.
      loud: whether the weight might serve as a matrix there; entry by entry, or as a vector, it does not.
      vector: whether at most one of its axes was there.
    """

    operation: str
    primitive: compat.Primitive | None
    loud: bool
    vector: bool


@dataclasses.dataclass
class Log:
    """What discovery has seen so far.

    Attributes:
      uses: every use, in the order of the program.
      right: the numbers of those in which the weight stands on the right of its product.
      by_data: the numbers of the look-ups whose places are data.
      withdrawn: the numbers of the uses that do not count: what came out of them served as a weight.
      meetings: by path.
      apart: the stored axes, as (path, axis), that a scan takes apart.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    right: set[int] = dataclasses.field(default_factory=set)
    by_data: set[int] = dataclasses.field(default_factory=set)
    withdrawn: set[int] = dataclasses.field(default_factory=set)
    meetings: dict[str, list[Meeting]] = dataclasses.field(default_factory=dict)
    apart: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    def use(self, view: Probe, kind: str, contracted: Sequence[int], batch: Sequence[int], eqn: compat.Eqn) -> set[int]:
        """Note the use of a view by some of its axes, for each weight it is made of; return the uses' numbers."""
        rest = [n for n in range(len(view.shape)) if n not in (*contracted, *batch)]

        def stored(site: str, wanted: Iterable[int]) -> frozenset[int]:
            return frozenset(axis for n in wanted for name, axis in view.axes[n] if name == site)

        first = len(self.uses)
        for site in view.sites:
            summed = frozenset(axis for name, axis in view.past.summed if name == site)
            use = Use(site, kind, stored(site, contracted), stored(site, batch), stored(site, rest), eqn, summed)
            inner = [n for n in sorted(view.past.waiting) if self.uses[n].site == site]
            if use.contracted or use.free or use.batch:
                self.uses.append(use)
            elif inner:  # between two weights: the one on its left is nearer to the data
                self.uses.append(self.uses[next((n for n in inner if n in self.right), inner[0])])
            else:
                self.meet(dataclasses.replace(view, sites=(site,)), view.past.through or eqn.primitive)
        return set(range(first, len(self.uses)))

    def serve(self, view: Probe, kind: str, contracted: Sequence[int], batch: Sequence[int], eqn: compat.Eqn) -> None:
        """Note that data meet a view as a weight: what it was used for on its way here does not count.

        But rows that are summed over (a bag of embeddings), or of which each row of data has its own, are looked up.
        """
        if view.past.rows:
            axes = {n: view.axes[n] for n in range(len(view.shape))}
            looked_up = {(u.site, n) for w in view.past.waiting for u in [self.uses[w]] for n in u.contracted}
            summed = looked_up & frozenset().union(*(axes[n] for n in contracted))
            own = looked_up & frozenset().union(*(axes[n] for n in batch))
            rest = frozenset().union(*(axes[n] for n in axes if n not in (*contracted, *batch)))
            if (summed and view.past.waiting & self.by_data) or own & rest:
                return
        of = frozenset().union(*(view.axes[n] for n in contracted))
        if view.past.mapped and not of & view.past.mapped:
            return  # the result of a product with a constant, not a weight that a constant resizes
        self.withdrawn |= view.past.waiting
        self.use(view, kind, contracted, batch, eqn)

    def meet(self, view: Probe, *where: compat.Primitive | str, loud: bool = True) -> None:
        """Note that a weight is lost among data, in some primitives or at another place in words."""
        if view.past.rows:
            return  # its look-up is noted
        name = " and ".join(one if isinstance(one, str) else one.name for one in where)
        primitive = None if len(where) > 1 or isinstance(where[0], str) else where[0]
        for site in view.sites:
            there = [n for n, label in enumerate(view.axes) if view.shape[n] != 1 and any(s == site for s, _ in label)]
            known = any(s == site for label in view.axes for s, _ in label)
            vector = known and len(there) < 2
            self.meetings.setdefault(site, []).append(Meeting(name, primitive, loud and not vector, vector))


def is_weight(value: Any) -> bool:
    """Say whether a value is a weight, and not rows picked from one."""
    return isinstance(value, Probe) and bool(value.sites) and not value.past.rows


def is_data(value: Any) -> bool:
    """Say whether a value depends on data, or is rows, which count as data."""
    return compat.is_tracer(value) or (isinstance(value, Probe) and value.past.rows)


def base(value: Any) -> Any:
    """Return the array of a value of discovery."""
    return value.base if isinstance(value, Probe) else value


def known(w: Any) -> Probe:
    """Return a value that depends on no data, and is no weight either."""
    return Probe(w, (frozenset(),) * w.ndim, w.dtype, ())


def numeric(dtype: Any) -> bool:
    """Say whether a dtype is one of numbers."""
    return jnp.issubdtype(dtype, jnp.number)


def all_sites(weights: Sequence[Probe]) -> tuple[str, ...]:
    """Return the paths of all parameters that weights are made of, each once."""
    return tuple(dict.fromkeys(site for v in weights for site in v.sites))


def beginning(w: Any, name: str) -> Probe:
    """Return a parameter as discovery starts with it: one without the axes or numbers of a weight is a constant."""
    if w.ndim < 2 or not numeric(w.dtype):
        return known(w)
    return Probe(w, tuple(frozenset({(name, n)}) for n in range(w.ndim)), w.dtype, (name,))


def guess(view: Probe, values: Sequence[Any], outs: Sequence[Any]) -> tuple[int, int, bool] | None:
    """Return the in- and the out-axis of a weight in an operation that nobody knows, by the sizes of what it met.

    And whether the sizes leave no other choice.

    The in-axis has a size that the data have, and the out-axis one that the result has; of the last two axes, since
    what comes before them is stacked. Row by row, as kernels of products store their weights, is tried first.
    """
    ins, made = _float_sizes([base(v) for v in values if is_data(v)]), _float_sizes(outs)
    last = len(view.shape) - 1
    options = [
        (i, o)
        for i, o in (((last - 1, last), (last, last - 1)) if last > 0 else ())
        if view.shape[i] in ins and view.shape[o] in made and view.axes[i] and view.axes[o]
    ]
    return (*options[0], len(options) == 1) if options else None


def _float_sizes(arrays: Sequence[Any]) -> set[int]:
    return {n for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact) for n in a.shape if n != 1}
