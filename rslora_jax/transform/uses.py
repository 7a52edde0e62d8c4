"""A tied weight of which one use is adapted, or each use by an adapter of its own: a table that is looked up, and is
multiplied as the head.

The program has one value for both. So it is one view: the factors of both adapters lie side by side along the rank,
whatever the program renames is renamed for both, and where the weight is used, its use picks its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from rslora_jax.transform.views import View, spans

LOOKUP, PRODUCT = "lookup", "product"
USES = (LOOKUP, PRODUCT)


class OfUse(NamedTuple):
    """What of a view is the adapter of one use.

    Attributes:
      use: "lookup" or "product".
      site: its path.
      ranks: from where and to where its factors lie along the rank; both 0 without factors.
      gamma, rate: of that adapter, as a `View` has them.
      has_gain: whether the view's gain is its own.
    """

    use: str
    site: str
    ranks: tuple[int, int]
    gamma: float
    rate: float
    has_gain: bool


def of_uses(views: Mapping[str, View]) -> View:
    """Return one view of a weight, given the view that each adapted use of it would have alone.

    Raises:
      ValueError: the adapters of both uses have a gain.
    """
    first, *others = views.values()
    if sum(view.gain is not None for view in views.values()) > 1:
        raise ValueError(f"{' and '.join(first.sites + others[0].sites)} both scale their weight: adapt one of them")
    uses, end = [], 0
    for use, view in views.items():
        start, end = end, end + (view.factors[0].shape[-1] if view.factors else 0)
        ranks = (start, end) if view.factors else (0, 0)
        uses.append(OfUse(use, view.sites[0], ranks, view.gamma, view.rate, view.gain is not None))
    pairs = [_in_one_order(view) for view in views.values() if view.factors]
    return dataclasses.replace(
        first,
        sites=tuple(of.site for of in uses),
        factors=tuple(of[0] if len(of) == 1 else jnp.concatenate(of, -1) for of in zip(*pairs, strict=True)),
        gamma=1.0,
        gain=next((view.gain for view in views.values() if view.gain is not None), None),
        along={f"{name}@{use}": part for use, view in views.items() for name, part in view.along.items()},
        rate=0.0,
        uses=tuple(uses),
    )


def at_use(view: View, use: str) -> View:
    """Return a view as it is where the weight is used so: with the adapter of this use, or with none."""
    if not view.uses:
        return view
    own = next((of for of in view.uses if of.use == use), None)
    kept: dict[str, Any] = {}
    if own is not None and own.has_gain:
        kept["gain"] = view.gain
    if own is not None and own.ranks[1]:
        kept["factors"] = tuple(factor[..., slice(*own.ranks)] for factor in view.factors)
    along = {name: part for name, part in view.along.items() if name.endswith(f"@{use}")}
    shared = _shared_by_name(view)
    names = [f"factor {n}" for n in range(len(kept.get("factors", ())))] + ["gain"] * ("gain" in kept) + sorted(along)
    return dataclasses.replace(
        view,
        **{"factors": (), "gain": None} | kept,
        along={name.removesuffix(f"@{use}"): part for name, part in along.items()},
        sites=() if own is None else (own.site,),
        gamma=1.0 if own is None else own.gamma,
        rate=0.0 if own is None else own.rate,
        uniform=tuple(shared[name] for name in names) if view.uniform else (),
        uses=(),
    )


def _in_one_order(view: View) -> tuple[Any, ...]:
    """Return the factors in the order of the axes they span: the in-axes of one use are out-axes of the other."""
    return tuple(sorted(view.factors, key=lambda factor: spans(view, factor), reverse=True))


def _shared_by_name(view: View) -> dict[str, frozenset[str]]:
    """Return `View.shared` by the name of each part."""
    names = [f"factor {n}" for n in range(len(view.factors))] + ["gain"] * (view.gain is not None) + sorted(view.along)
    return dict(zip(names, view.shared, strict=True))
