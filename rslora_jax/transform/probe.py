"""A weight as discovery sees it: a view without an adapter, which remembers what was done to it."""

import dataclasses
from collections.abc import Sequence

import jax

from rslora_jax.transform import compat
from rslora_jax.transform.views import STATIC, Axes, View


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

    through: compat.Primitive | None = None
    met: compat.Primitive | None = None
    rows: bool = False
    copies: bool = False
    summed: Axes = frozenset()
    mapped: Axes = frozenset()
    resized: bool = False
    waiting: frozenset[int] = frozenset()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(View):
    """A weight, or a constant, while sites are being discovered: it has no adapter yet, and is never trained.

    Attributes:
      past: what discovery remembers of it.
    """

    past: Past = dataclasses.field(default=Past(), metadata=STATIC)


def one_past(views: Sequence["Probe"]) -> Past:
    """Return what is remembered of a value that is made of several weights."""
    pasts = [v.past for v in views]
    return Past(
        next((p.through for p in pasts if p.through), None),
        next((p.met for p in pasts if p.met), None),
        any(p.rows for p in pasts),
        any(p.copies for p in pasts),
        frozenset().union(*(p.summed for p in pasts)),
        frozenset().union(*(p.mapped for p in pasts)),
        any(p.resized for p in pasts),
        frozenset().union(*(p.waiting for p in pasts)),
    )
