"""How ranks and scales are written: each module's own, as PEFT can, or one for all, as servers need."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

from rslora_jax import scaling
from rslora_jax.wrap import Lora


@dataclasses.dataclass(frozen=True)
class Scales:
    """How ranks and scales are written: those of most modules, and each weight's own (rank, alpha, factor on B)."""

    rank: int
    alpha: float
    scaling: str
    own: Mapping[str, tuple[int, float, float]]


def own_scales(lora: Lora, *, use_rslora: bool | None = None) -> Scales:
    """Give every weight its own rank and alpha, as PEFT can.

    Args:
      lora: from `wrap`.
      use_rslora: whether alpha is divided by sqrt(r), or by r; by default as the run has it. Where that is another way
        than the run's, alpha is what gives the same scale.
    """
    named = lora.config.scaling in ("rslora", "lora")
    formula = str(lora.config.scaling) if named else "lora"
    if use_rslora is not None:
        formula = "rslora" if use_rslora else "lora"
    same = formula == lora.config.scaling
    own = {
        path: (site.rank, site.alpha if same else site.gamma / scaling.gamma(site.rank, 1.0, formula), 1.0)
        for path, site in lora.sites.items()
    }
    (rank, alpha, _), _ = collections.Counter(own.values()).most_common(1)[0]
    return Scales(rank, alpha, formula, own)


def one_scale(lora: Lora, *, use_rslora: bool | None = None) -> Scales:
    """Give all weights the largest rank and one scale, and what differs to B; arguments as of `own_scales`.

    The scale is that of most of the modules of the largest rank, which so keep their numbers.
    """
    plan = own_scales(lora, use_rslora=use_rslora)
    rank = max(site.rank for site in lora.sites.values())
    alphas = collections.Counter(alpha for of, alpha, _ in plan.own.values() if of == rank)
    alpha = alphas.most_common(1)[0][0]
    gamma = scaling.gamma(rank, alpha, plan.scaling)
    # By the same formula for the same rank and alpha, so that nothing changes where nothing needs to.
    of = {path: scaling.gamma(own[0], own[1], plan.scaling) for path, own in plan.own.items()}
    return Scales(rank, alpha, plan.scaling, {path: (rank, alpha, value / gamma) for path, value in of.items()})
