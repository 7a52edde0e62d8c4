"""LoftQ: put the base into few bits, and start at the principal part of what that loses (arXiv 2310.08659)."""

from __future__ import annotations

from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.starts.pissa import principal
from rslora_jax.starts.stream import (
    Progress,
    changed_of,
    check_changes,
    counted,
    found_of,
    on_mesh,
    started,
    unseen,
)
from rslora_jax.stored.quantize import kept_leaves, rounded
from rslora_jax.stored.rounding import rounding
from rslora_jax.wrap import Lora


def loftq(
    lora: Lora,
    params: Params,
    key: Array,
    *,
    format: str = "nf4",
    steps: int = 1,
    block: int | None = None,
    double: bool = True,
    progress: Progress = unseen,
) -> tuple[Params, Adapters]:
    """Start adapters at the largest singular values of what their weights lose in fewer bits.

    By turns Q = q(W - gamma A B), with A B = 0 at first, and gamma A B the first r singular values of W - Q (arXiv
    2310.08659, algorithm 1), with the scale of the adapter's own rank; PEFT leaves the scale out, so that there its
    alpha is to be that of a scale of 1. The base becomes the last Q. With one step it is that of `quantize`, given the
    same `lora`. What that leaves as it is, such as a table, stays, and its adapter is new.

    Weights go one after the other, and the decompositions layer by layer: beside the result there is one dense weight,
    and with more than one step two.

    Args:
      lora: from `wrap`, of the method LoRA or DoRA, whose magnitudes are those of the weights as they were.
      params: the base, in arrays; it stays as it is.
      key: a PRNG key, for what DoRA draws.
      format, block, double: as of `quantize`.
      steps: how many turns; the paper takes 1 to 5.
      progress: told the number of matrices done, over all turns, and their number in all.

    Returns:
      (params, adapters): the base, of which the adapted weights are stored in the format, and others as `quantize`
      would have it; and the adapters that belong to it.

    Raises:
      ValueError: as of `pissa` and of `quantize`, or `steps` is no number of turns.

    >>> import jax, jax.numpy as jnp, rslora_jax as rslora
    >>> base = {"w": jax.random.normal(jax.random.key(1), (64, 32))}
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, jnp.ones((1, 64)), config=rslora.LoraConfig(rank=8, alpha=3))
    >>> params, adapters = loftq(lora, base, jax.random.key(0))
    >>> lost = [jnp.linalg.norm(of - base["w"]) for of in (params["w"].dense(), lora.merge(params, adapters)["w"])]
    >>> bool(lost[1] < 0.75 * lost[0])
    True
    """
    how, leaves = rounding(format, block=block, double=double), named_leaves(params)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} is no number of turns: give 1 or more, such as 5")
    check_changes(lora, params)
    adapters, where = lora.init(key, params), on_mesh(lora, params)
    kept = kept_leaves(leaves, lora)
    sites = {path: site for path, site in started(lora).items() if path not in kept}
    seen = counted(sites, progress, steps)
    for path, site in sites.items():
        w = leaves[path]
        for turn in range(steps):
            stored, _ = rounded(path, changed_of(site, w, adapters[path]) if turn else w, how, site)
            adapters[path] = found_of(
                site, adapters[path], w, key, principal, (None,), where.get(path, {}), seen, minus=stored
            )
        leaves[path] = stored
    for path in leaves.keys() - kept.keys() - sites.keys():
        leaves[path], _ = rounded(path, leaves[path], how)
    return from_paths(params, leaves), adapters
