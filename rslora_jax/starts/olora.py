"""OLoRA: start at an orthonormal basis out of each weight's QR decomposition (arXiv 2406.01775)."""

from __future__ import annotations

from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.starts.stream import Progress, changed, check_changes, found, unseen
from rslora_jax.starts.svd import basis_of
from rslora_jax.wrap import Lora


def olora(lora: Lora, params: Params, key: Array, *, progress: Progress = unseen) -> tuple[Params, Adapters]:
    """Start adapters at the first columns of Q in W' = Q R, the weight's transpose.

    B = Q_r' and A = R_r', and the base becomes W - gamma A B (arXiv 2406.01775, algorithm 1). As the first columns of Q
    depend on the first rows of W alone, these are all that is decomposed, and R_r is Q_r' W'.

    Args, Returns and Raises as of `pissa`; nothing is drawn but what DoRA draws.

    >>> import jax, jax.numpy as jnp, rslora_jax as rslora
    >>> base, x = {"w": jax.random.normal(jax.random.key(1), (6, 5))}, jnp.ones((1, 6))
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, x, config=rslora.LoraConfig(rank=2, alpha=3))
    >>> params, adapters = olora(lora, base, jax.random.key(0))
    >>> bool(jnp.allclose(lora.apply(params, adapters, x), x @ base["w"], atol=1e-5))
    True
    """
    check_changes(lora, params)
    start = found(lora, params, key, _basis, progress=progress)
    return changed(lora, params, start), start


def _basis(site: Site, w_IxO: Array, key: Array) -> tuple[Array, Array]:
    q_OxR = basis_of(w_IxO[: site.rank].T)
    return w_IxO @ q_OxR, q_OxR.T
