"""How ranks and scales are written: each module's own, as PEFT can, or one for all, as servers need."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from rslora_jax import scaling
from rslora_jax.layers import Layer
from rslora_jax.wrap import Lora


@dataclasses.dataclass(frozen=True)
class Scales:
    """How ranks and scales are written.

    Attributes:
      rank, alpha: those of most modules.
      scaling: "rslora" or "lora".
      own: the rank, the alpha and the factor on B of every adapter, by path; where layers differ, by path and layer.
    """

    rank: int
    alpha: float
    scaling: str
    own: Mapping[tuple[str, int | None], tuple[int, float, float]]

    def of(self, path: str, layer: int | None) -> tuple[int, float, float]:
        """Return the rank, the alpha and the factor on B of an adapter, or of a layer of one."""
        return self.own[path, layer if (path, layer) in self.own else None]


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
        key: (one.rank, one.alpha if same else one.gamma / scaling.gamma(one.rank, 1.0, formula), 1.0)
        for key, one in _each(lora)
    }
    if not own:
        raise ValueError("no weight has an adapter of a rank, and PEFT's LoRA is of those: merge what is trained whole")
    (rank, alpha, _), _ = collections.Counter(own.values()).most_common(1)[0]
    return Scales(rank, alpha, formula, own)


def _each(lora: Lora) -> Iterator[tuple[tuple[str, int | None], Layer]]:
    """Yield what every adapter has, by path, and by layer where these differ."""
    for path, site in ((path, site) for path, site in lora.sites.items() if site.scaled):
        if not site.layers:
            yield (path, None), Layer(site.rank, site.alpha, site.gamma)
        yield from (((path, n), layer) for n, layer in enumerate(site.layers) if layer.rank)


def one_scale(lora: Lora, *, use_rslora: bool | None = None) -> Scales:
    """Give all weights the largest rank and one scale, and what differs to B; arguments as of `own_scales`.

    The scale is that of most of the modules of the largest rank, which so keep their numbers.
    """
    plan = own_scales(lora, use_rslora=use_rslora)
    rank = max(of for of, _, _ in plan.own.values())
    alphas = collections.Counter(alpha for of, alpha, _ in plan.own.values() if of == rank)
    alpha = alphas.most_common(1)[0][0]
    gamma = scaling.gamma(rank, alpha, plan.scaling)
    # By the same formula for the same rank and alpha, so that nothing changes where nothing needs to.
    of = {key: scaling.gamma(own[0], own[1], plan.scaling) for key, own in plan.own.items()}
    return Scales(rank, alpha, plan.scaling, {key: (rank, alpha, value / gamma) for key, value in of.items()})
