"""What rounding does to a merged model: measured by matrix, put together by kind, said in a sentence."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from rslora_jax.table import shared_name


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding did to one adapted matrix, or to several: Frobenius norms, in float64.

    Attributes:
      name: the Hugging Face name, or what several names share.
      count: how many matrices.
      error: ||merged - exact||, where exact = W + gamma A B and W is the base as the adapters were trained on it.
      update: ||gamma A B||.
      weight: ||W||.

    >>> Rounding("w", 1, error=0.5, update=2.0, weight=4.0).relative
    0.25
    """

    name: str
    count: int
    error: float
    update: float
    weight: float

    @property
    def relative(self) -> float:
        """||merged - exact|| / ||update||; NaN where there is no update."""
        return self.error / self.update if self.update else math.nan


def by_kind(roundings: Iterable[Rounding]) -> list[Rounding]:
    """Put together the layers of each kind of weight.

    >>> layers = [Rounding(f"layers.{n}.w", 1, error=3.0 + n, update=10.0, weight=1.0) for n in range(2)]
    >>> [(kind.name, kind.count, kind.error) for kind in by_kind(layers)]
    [('layers.{0..1}.w', 2, 5.0)]
    """
    kinds: dict[str, list[Rounding]] = {}
    for rounding in roundings:
        kinds.setdefault(re.sub(r"\d+", "*", rounding.name), []).append(rounding)
    return [together(shared_name([one.name for one in group]), group) for group in kinds.values()]


def together(name: str, roundings: Iterable[Rounding]) -> Rounding:
    """Put roundings together as if their matrices were one."""
    group = list(roundings)
    norms = (math.hypot(*(getattr(one, field) for one in group)) for field in ("error", "update", "weight"))
    return Rounding(name, sum(one.count for one in group), *norms)


def meaning(total: Rounding, dtype: str) -> str:
    """Say in a sentence what the rounding of all matrices together means.

    >>> meaning(Rounding("all", 3, error=0.1, update=1.0, weight=9.0), "float16")
    'rounding to float16 moves the merged weights by 0.1 of the update'
    """
    if not total.update:
        return "the update is zero: the merged model is the base"
    said = f"rounding to {dtype} moves the merged weights by {total.relative:.2g} of the update"
    if total.relative <= 0.5:
        return said
    finer = {"bfloat16": "float16 or float32", "float16": "float32", "float32": ""}.get(dtype, "bfloat16")
    wider = f", or merge in {finer}" if finer else ""
    return f"{said}: most of what was learned may be rounded away; keep the adapters apart from the base{wider}"
