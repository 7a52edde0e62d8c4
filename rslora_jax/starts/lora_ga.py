"""LoRA-GA: start along the directions of the loss's gradient by each weight (arXiv 2407.05000)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.adapters import Adapters
from rslora_jax.pytrees import Params
from rslora_jax.sites import Site
from rslora_jax.starts.passes import Passes, drawn, filled, listed, split, with_rank
from rslora_jax.starts.stream import Progress, changed, check_changes, on_mesh, placed_as, started, unseen
from rslora_jax.starts.svd import basis_of
from rslora_jax.wrap import Lora

_MORE = 10  # directions beside those asked for (arXiv 0909.4061, section 4.2)


def lora_ga(
    lora: Lora,
    params: Params,
    key: Array,
    loss: Callable[..., Any],
    batches: Iterable[Any],
    *,
    stable_gamma: float = 16.0,
    niter: int = 1,
    progress: Progress = unseen,
) -> tuple[Params, Adapters]:
    """Start A and B along singular vectors of the gradient G = U S V' of the loss by their weight.

    A is U_1..r and B is V'_r+1..2r, each times out^(1/4) / sqrt(stable_gamma), and the base becomes W - gamma A B
    (arXiv 2407.05000, algorithm 1; PEFT scales B alone, and by its singular values too). Where a weight has fewer than
    2r directions, B takes the last r.

    No gradient of a weight's size is needed: those by A and B of an adapter are G B' and A' G for any A and B, with
    which the decomposition is that of random directions (arXiv 0909.4061), over all batches. (At ranks near half the
    width, where it is cheaper, one weight's product may form its own for a moment.)

    Args:
      lora: from `wrap`, of the method LoRA or DoRA.
      params: the base; it stays as it is.
      key: a PRNG key.
      loss: `loss(run, batch) -> (sum, count)`, as `train.make_step` takes it.
      batches: some batches, gone over 2 + 2 niter times.
      stable_gamma: the smaller, the larger the start.
      niter: power iterations.
      progress: told how many batches of how many are done.

    Returns:
      (params, adapters), as `pissa`.

    Raises:
      ValueError: as of `pissa`; there are no batches, or no gradient arrives at a weight.

    >>> import rslora_jax as rslora
    >>> base, x = {"w": jnp.ones((6, 5))}, jnp.ones((1, 6))
    >>> lora = rslora.wrap(lambda p, x: x @ p["w"], base, x, config=rslora.LoraConfig(rank=2, alpha=3))
    >>> params, adapters = lora_ga(lora, base, jax.random.key(0), lambda run, x: (run(x).sum(), 1), [x])
    >>> bool(jnp.allclose(lora.apply(params, adapters, x), x @ base["w"], atol=1e-5))
    True
    """
    check_changes(lora, params)
    found = listed(batches, "LoRA-GA")
    full = {path: min(site.in_size, site.out_size) for path, site in started(lora).items()}
    wider = with_rank(lora, {path: min(2 * s.rank + _MORE, full[path]) for path, s in started(lora).items()})

    def act(params: Params, adapters: Adapters, batch: Any) -> Adapters:
        def value(adapters: Adapters) -> Array:
            returned = loss(functools.partial(wider.apply, params, adapters), batch)
            return returned[0] if isinstance(returned, tuple) else returned

        return jax.grad(value)(adapters)

    going = Passes(act, found, 2 + 2 * niter, progress)
    second = drawn(wider, key, first=False)
    for _ in range(1 + niter):
        met, _ = split(wider, going.sum(params, filled(wider, None, second)))
        basis = {path: basis_of(y) for path, y in met.items()}
        _, through = split(wider, going.sum(params, filled(wider, basis, None)))
        second = {path: jnp.swapaxes(basis_of(jnp.swapaxes(z, -1, -2)), -1, -2) for path, z in through.items()}
    start, where = lora.init(key, params), on_mesh(lora, params)
    for path, site in started(lora).items():
        if not bool(jnp.any(through[path] != 0)):
            raise ValueError(f"no gradient of the loss arrives at {path}: exclude it")
        size = site.out_size**0.25 / stable_gamma**0.5
        first, last = _directions(basis[path], through[path], _begins(site), site.rank)
        start[path] |= placed_as(site, start[path], size * first, size * last, where.get(path, {}))
    return changed(lora, params, start), start


@functools.partial(jax.jit, static_argnums=3)
def _directions(basis: Array, through: Array, begins: Any, rank: int) -> tuple[Array, Array]:
    """Return the left singular vectors of G ~ Q (Q'G) from the first on, and the right ones from where each begins."""
    u, _, vt = jnp.linalg.svd(through, full_matrices=False)
    at = jnp.minimum(jnp.asarray(begins)[..., None] + jnp.arange(rank), vt.shape[-2] - 1)
    return (basis @ u)[..., :rank], jnp.take_along_axis(vt, at[..., None], -2)


def _begins(site: Site) -> np.ndarray:
    """Return at which singular vector B begins, of each matrix of a stack: at r, of its own rank r, or as near."""
    full = min(site.in_size, site.out_size)
    numbers = np.asarray(site.by_layer(lambda layer: min(2 * layer.rank, full) - layer.rank), np.int32)
    return np.broadcast_to(numbers, site.sizes(site.stack_axes))
