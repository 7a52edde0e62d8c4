"""Which token comes next: how its logits are changed, and what of them may be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# The numbers that a token is chosen by, those alone that do something: another choice of them is another program.
Choosing = Mapping[str, Any]


def choosing(
    *,
    vocab_size: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Choosing:
    """Give the numbers that tokens are chosen by.

    Args:
      vocab_size: the number of tokens.
      temperature: 0 takes the likeliest token, and the next three then do nothing; above, one is drawn.
      top_k: so many of the likeliest may be drawn; 0 for all.
      top_p: of these, the fewest that hold so much of the probability (arXiv 1904.09751, section 3.1).
      min_p: of these, those that are so likely beside the likeliest (arXiv 2407.01082).
      repetition_penalty: the logits of tokens that are there already are divided by it, or multiplied where they are
        below 0 (arXiv 1909.05858, section 4.1).

    Raises:
      ValueError: one is out of its range.

    >>> sorted(choosing(vocab_size=9, temperature=0.5, top_p=0.9)), choosing(vocab_size=9, top_k=3)
    (['temperature', 'top_p'], {})
    """
    if not (0 <= temperature < np.inf and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_p={top_p}: give at least 0, and 0 < top_p <= 1")
    if top_k < 0 or not 0 <= min_p <= 1:
        raise ValueError(f"top_k={top_k}, min_p={min_p}: give at least 0, and 0 <= min_p <= 1")
    if not 0 < repetition_penalty < np.inf:
        raise ValueError(f"repetition_penalty={repetition_penalty}: give a number above 0, and 1 for none")
    found: dict[str, np.generic] = {}
    if repetition_penalty != 1:
        found["repetition_penalty"] = np.float32(repetition_penalty)
    if not temperature:
        return found
    found["temperature"] = np.float32(temperature)
    if 0 < top_k < vocab_size:
        found["top_k"] = np.int32(top_k)
    if top_p < 1:
        found["top_p"] = np.float32(top_p)
    if min_p > 0:
        found["min_p"] = np.float32(min_p)
    return found


def changed(logits_V: Array, seen_V: Array | None, by: Choosing) -> Array:
    """Change logits (V,), float32, by `choosing`'s numbers, in the order of transformers; -inf may not be drawn.

    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> changed(logits, None, choosing(vocab_size=3, temperature=1.0, top_p=0.7)).round(2).tolist()[2]
    -inf
    """
    if "repetition_penalty" in by and seen_V is not None:
        less_V = jnp.where(logits_V < 0, logits_V * by["repetition_penalty"], logits_V / by["repetition_penalty"])
        logits_V = jnp.where(seen_V, less_V, logits_V)
    if "temperature" in by:
        logits_V = logits_V / by["temperature"]
    if "top_k" in by:
        least = jnp.sort(logits_V, descending=True)[by["top_k"] - 1]
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    if "top_p" in by:
        falling_V = jnp.sort(jax.nn.softmax(logits_V), descending=True)
        # A token is kept when those before it hold less than top_p: the likeliest one always is.
        kept_V = jnp.cumsum(falling_V) - falling_V < by["top_p"]
        floor = jnp.min(jnp.where(kept_V, falling_V, jnp.inf))
        logits_V = jnp.where(jax.nn.softmax(logits_V) >= floor, logits_V, -jnp.inf)
    if "min_p" in by:
        likely_V = jax.nn.softmax(logits_V)
        logits_V = jnp.where(likely_V >= by["min_p"] * jnp.max(likely_V), logits_V, -jnp.inf)
    return logits_V


def next_token(key: Array | None, logits_V: Array, seen_V: Array | None, by: Choosing) -> Array:
    """Give a token's id (), drawn where there is a key, or else the likeliest; arguments as of `changed`."""
    logits_V = changed(logits_V, seen_V, by)
    return jnp.argmax(logits_V) if key is None else jax.random.categorical(key, logits_V)
