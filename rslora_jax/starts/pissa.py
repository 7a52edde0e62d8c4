"""PiSSA: start at the principal part of each weight, and leave the base what remains (arXiv 2404.02948)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.starts.stream import Progress, changed, check_changes, found, unseen
from rslora_jax.starts.svd import leading
from rslora_jax.wrap import Lora


def pissa(
    lora: Lora, params: Params, key: Array, *, niter: int | None = None, progress: Progress = unseen
) -> tuple[Params, Adapters]:
    """Start adapters at the largest singular values of their weights, W = U S V'.

    A = U_r sqrt(S_r / gamma) and B = sqrt(S_r / gamma) V_r', and the base becomes W - gamma A B (arXiv 2404.02948,
    equations 2 to 4, with the scale of the adapter's own rank).

    Args:
      lora: from `wrap`, of the method LoRA or DoRA, whose magnitudes are those of the weights as they were.
      params: the base; it stays as it is.
      key: a PRNG key.
      niter: how many power iterations of a randomised decomposition to take, such as 16; None for the exact one.
      progress: told the number of matrices done and their number in all.

    Returns:
      (params, adapters): the changed base and the adapters that belong to it, with which the function is what it was
      to rounding. Shapes, dtypes and shardings are those of `params` and of `lora.init`.

    Raises:
      ValueError: a weight is stored in a form of its own or adapted in one use alone, or the method has no A and B.

    >>> import jax, rslora_jax as rslora
    >>> base = {"w": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, jnp.ones((1, 4)), config=rslora.LoraConfig(rank=2, alpha=3))
    >>> params, adapters = pissa(lora, base, jax.random.key(0))
    >>> params["w"].diagonal().astype(int).tolist(), bool(jnp.allclose(lora.merge(params, adapters)["w"], base["w"]))
    ([0, 0, 2, 1], True)
    """
    check_changes(lora, params)
    if niter is not None and niter < 0:
        raise ValueError(f"niter={niter} is no number of iterations: give 0 or more, or None for the exact start")
    start = found(lora, params, key, principal, (niter,), progress=progress)
    return changed(lora, params, start), start


def principal(site: Site, w_IxO: Array, key: Array, niter: int | None) -> tuple[Array, Array]:
    """Return A and B of which gamma A B is a matrix's part of the r largest singular values."""
    u_IxR, s_R, vt_RxO = leading(w_IxO, site.rank, key, niter)
    size_R = jnp.sqrt(s_R / site.gamma)
    return u_IxR * size_R, size_R[:, None] * vt_RxO
