"""EVA: start at the directions in which the data that each weight meets vary most (arXiv 2410.07170)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.starts.stream import Progress, check_method, on_mesh, placed_as, started, unseen
from rslora_jax.starts.variance import spread
from rslora_jax.wrap import Lora


def eva(
    lora: Lora,
    params: Params,
    key: Array,
    batches: Iterable[Any],
    *,
    loss: Callable[..., Any] | None = None,
    passes: int = 3,
    progress: Progress = unseen,
) -> tuple[Params, Adapters]:
    """Start A at the leading singular vectors of the data that its weight meets, and B at zero.

    The base stays. Data are taken as they are, not less their mean, as the paper has it (PEFT takes the mean off), and
    all of them, those of padded tokens too: no mask of the loss is known where a weight meets its data.
    A table that is looked up starts as without this: of indices, the directions would be the commonest tokens.

    Args:
      lora: from `wrap`.
      params: the base.
      key: a PRNG key.
      batches: some batches, gone over `passes` times: each a tuple of the function's arguments behind the parameters.
      loss: `loss(run, batch)`, where batches are what this takes; its value does not matter.
      passes: the more, the nearer to the exact directions; exact where a weight has few inputs.
      progress: told how many batches of how many are done.

    Returns:
      (params, adapters); the base as it was given.

    Raises:
      ValueError: there are no batches, or a weight meets its data in a way that cannot be looked at; it is named.

    >>> import jax, rslora_jax as rslora
    >>> base, x = {"w": jnp.ones((3, 5))}, jnp.array([[0.0, 1.0, 0.0], [0.0, -2.0, 0.1]])
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, x, config=rslora.LoraConfig(rank=1, alpha=3))
    >>> _, adapters = eva(lora, base, jax.random.key(0), [(x,)])
    >>> jnp.abs(adapters["w"]["a"]).round(1).ravel().tolist(), float(jnp.abs(adapters["w"]["b"]).max())
    ([0.0, 1.0, 0.0], 0.0)
    """
    check_method(lora)
    ranks = {path: site.rank for path, site in started(lora).items() if site.kind != "embedding"}
    found = spread(lora, params, key, ranks, batches, loss=loss, passes=passes, progress=progress)
    adapters, where = lora.init(key, params), on_mesh(lora, params)
    for path, of in found.items():
        site = lora.sites[path]
        second = jnp.zeros((*site.sizes(site.stack_axes), site.rank, site.out_size))
        adapters[path] |= placed_as(site, adapters[path], of.directions, second, where.get(path, {}))
    return params, adapters
