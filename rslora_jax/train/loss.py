"""The loss of a decoder on the tokens it is to learn, with logits at those tokens only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rslora_jax.chunk_sum import chunk_sum, chunks
from rslora_jax.train.batches import Batch

# A loss takes a model whose parameters are bound (`run(tokens, ...)`) and a batch, and returns the sum of the
# losses and their number. Sums add up over batches of unequal numbers; means do not.
# One that draws at random takes a key as well (`fit(key=...)`). One of a model with state takes that before the key,
# and returns (sum, count, state); its model is `run(state, ...) -> (out, state)` (`fit(model_state=...)`).
Loss = Callable[..., tuple[Any, ...]]

# Tokens of a chunk on a mesh: a head that is split over devices is gathered anew for each chunk.
CHUNK_ON_MESH = 512


def token_loss(places: int, *, chunk: int | None = None) -> Loss:
    """Make the cross-entropy loss of a `rslora_jax.models.Decoder` over the tokens that a batch marks.

    Most tokens of a batch are prompt and carry no loss. The product with the vocabulary, the largest of all,
    is made only at `places` tokens of each row: `Rows.places` is enough for every row. What is marked beyond
    that would be lost, so the loss is then NaN. Of more tokens than a chunk has, logits are made and their gradient is
    formed a chunk at a time (`chunk_sum`).

    Args:
      places: how many tokens of a row can carry a loss.
      chunk: of how many tokens of each row logits are held at a time: by default 128, of a single row 256, with which
        the product is still worth a reading of the head on a device that has two rows. Where the head is split over
        devices, which gather it for each chunk, give `CHUNK_ON_MESH` or more.

    Returns:
      `loss(run, batch) -> (sum, count)`, both float32; the sum is in nats.
    """

    def loss(run: Callable[..., Any], batch: Batch) -> tuple[Array, Array]:
        x_BxTxD = states(run, batch)
        mask, targets = jnp.asarray(batch.loss_mask_BxT), jnp.asarray(batch.targets_BxT)
        count = jnp.sum(mask)
        if places < mask.shape[1]:
            mask, at_BxP = jax.lax.top_k(mask, places)
            x_BxTxD = jnp.take_along_axis(x_BxTxD, at_BxP[..., None], axis=1)
            targets = jnp.take_along_axis(targets, at_BxP, axis=1)
        size = _size(mask.shape[0]) if chunk is None else chunk
        total = _in_chunks(functools.partial(run, method="head"), x_BxTxD, targets, mask, size)
        return jnp.where(jnp.sum(mask) == count, total, jnp.nan), count

    return loss


def states(run: Callable[..., Any], batch: Batch) -> Array:
    """Give the states (B, T, D) of a batch by a `rslora_jax.models.Decoder`.

    It is told where there is no example: to a kernel rows come in order, which positions that are all 0 are not.
    """
    is_token = jnp.asarray(batch.segment_ids_BxT) > 0
    positions_BxT = jnp.where(is_token, batch.positions_BxT, -1)
    return run(batch.tokens_BxT, positions_BxT, batch.segment_ids_BxT, method="hidden")


def _in_chunks(head: Callable[[Array], Array], x_BxPxD: Array, targets: Array, mask: Array, size: int) -> Array:
    """Sum the losses of tokens, at most `size` of each row at a time."""

    def value(x: Array, targets: Array, mask: Array) -> Array:
        return cross_entropy(head(x), targets, mask)

    if mask.shape[1] <= size:
        return value(x_BxPxD, targets, mask)
    return chunk_sum(value, *(chunks(array, size) for array in (x_BxPxD, targets, mask)))


def token_losses(head: Callable[[Array], Array], x_BxPxD: Array, targets: Array) -> Array:
    """Give the negative log-likelihood of each token's target, float32 (B, P), with logits as `token_loss` has them.

    For evaluation: a gradient would keep the logits of all.
    """

    def losses(of: tuple[Array, Array]) -> Array:
        x, targets = of
        return optax.softmax_cross_entropy_with_integer_labels(head(x).astype(jnp.float32), targets)

    size = _size(targets.shape[0])
    if targets.shape[1] <= size:
        return losses((x_BxPxD, targets))
    found_CxBxS = jax.lax.map(losses, (chunks(x_BxPxD, size), chunks(targets, size)))
    return jnp.moveaxis(found_CxBxS, 0, 1).reshape(targets.shape[0], -1)[:, : targets.shape[1]]


def _size(rows: int) -> int:
    """Return of how many tokens of each of so many rows logits are held at a time."""
    return max(128, 256 // rows)


def logits_loss(run: Callable[..., Any], batch: Batch) -> tuple[Array, Array]:
    """Compute the loss of any model that turns tokens (B, T) into logits (B, T, V).

    Give it unpacked rows (`prepare(..., packed=False)`): this model is told neither positions nor segments.

    Returns:
      (sum, count), both float32; the sum is in nats.
    """
    mask = jnp.asarray(batch.loss_mask_BxT)
    return cross_entropy(run(batch.tokens_BxT), jnp.asarray(batch.targets_BxT), mask), jnp.sum(mask)


def cross_entropy(logits: Array, targets: Array, mask: Array) -> Array:
    """Sum the negative log-likelihood of `targets` (...) under `logits` (..., V) where `mask` (...) is 1.

    >>> round(float(cross_entropy(jnp.zeros((2, 4)), jnp.array([1, 3]), jnp.array([1.0, 0.0]))), 4)
    1.3863
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    # Where there is no target there may be no number either, and 0 * NaN is NaN.
    return jnp.sum(jnp.where(mask > 0, losses * mask, 0))
