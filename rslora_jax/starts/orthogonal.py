"""Orthogonal: start with A and B both full, of which the product is zero."""

from __future__ import annotations

import jax
from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.starts.stream import Progress, check_method, found, started, unseen
from rslora_jax.starts.svd import basis_of
from rslora_jax.wrap import Lora

_SMALLER = 10.0  # as in PEFT


def orthogonal(lora: Lora, params: Params, key: Array, *, progress: Progress = unseen) -> tuple[Params, Adapters]:
    """Start A and B from the odd and the even rows of one random orthogonal matrix, so that A B = 0 to rounding.

    With Q orthogonal of r x r and random G and H, A = G Q_odd / 10 and B = Q_even' H / 10, as PEFT's
    `init_lora_weights="orthogonal"`; both learn from the first step on, and the base stays.

    Args, Returns and Raises as of `pissa`, but that the base is returned as it is and may be stored in a form of its
    own; an odd rank is an error.

    >>> import jax.numpy as jnp, rslora_jax as rslora
    >>> base = {"w": jnp.ones((6, 5))}
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, jnp.ones((1, 6)), config=rslora.LoraConfig(rank=4, alpha=3))
    >>> _, adapters = orthogonal(lora, base, jax.random.key(0))
    >>> bool(jnp.abs(lora.merge(base, adapters)["w"] - 1).max() < 1e-6)
    True
    """
    check_method(lora)
    for path, site in started(lora).items():
        for rank in (site.rank, *(layer.rank for layer in site.layers)):
            if rank % 2:
                raise ValueError(f"{path} has rank {rank}, and the orthogonal start halves it: give it an even one")
    return params, found(lora, params, key, _halves, reads=False, progress=progress)


def _halves(site: Site, w: None, key: Array) -> tuple[Array, Array]:
    of_q, of_first, of_second = jax.random.split(key, 3)
    half = site.rank // 2
    q_RxR = basis_of(jax.random.normal(of_q, (site.rank, site.rank)))
    first = jax.random.normal(of_first, (site.in_size, half)) @ q_RxR[0::2] / _SMALLER
    second = q_RxR[1::2].T @ jax.random.normal(of_second, (half, site.out_size)) / _SMALLER
    return first, second
