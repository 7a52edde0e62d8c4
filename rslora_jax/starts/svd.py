"""The leading singular vectors of a matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

_MORE = 10  # directions beside those asked for: five to ten are enough (arXiv 0909.4061, section 4.2)


def leading(w_IxO: Array, rank: int, key: Array, niter: int | None) -> tuple[Array, Array, Array]:
    """Return (u_IxR, s_R, vt_RxO), the first of a matrix's singular value decomposition.

    Args:
      w_IxO: the matrix.
      rank: how many.
      key: a PRNG key.
      niter: None for the exact decomposition, or how many power iterations to take of random directions
        (arXiv 0909.4061, algorithms 4.4 and 5.1): each brings them nearer, at two products with the matrix.

    >>> w = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
    >>> [leading(w, 2, jax.random.key(0), niter)[1].round().tolist() for niter in (None, 4)]
    [[3.0, 2.0], [3.0, 2.0]]
    """
    if niter is None:
        u, s, vt = jnp.linalg.svd(w_IxO, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    width = min(rank + _MORE, *w_IxO.shape)
    basis = basis_of(w_IxO @ jax.random.normal(key, (w_IxO.shape[1], width), w_IxO.dtype))
    for _ in range(niter):
        basis = basis_of(w_IxO @ basis_of(w_IxO.T @ basis))
    u, s, vt = jnp.linalg.svd(basis.T @ w_IxO, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank]


def basis_of(y: Array) -> Array:
    """Return an orthonormal basis of a matrix's columns, or of those of a stack of matrices."""
    return jnp.linalg.qr(y)[0]
