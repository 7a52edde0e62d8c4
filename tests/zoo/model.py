"""An entry of the zoo: a model that others wrote, and what is known of its weights without looking at the library."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.config import matches
from rslora_jax.sites import named_leaves

Axes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's function, parameters and arguments, and which of its parameters are weights.

    Attributes:
      fn: from (params, *args) to arrays.
      no_weights: globs over the parameters with two axes or more that are no weights of a product or a look-up,
        beside those called bias or scale.
      axes: by glob, a weight's axes that are summed over (or indexed) and that are left; the rest is stacked.
        Where no glob matches, the last axis is left and all others are summed over.
      head: a glob over the weights that make the output, which the default targets leave out with the tables.
      start, step: how a decoder generates: `start(params, *context)` gives an empty cache and a state that stays,
        `step(params, tokens, cache, at, state)` the logits of some more tokens and the cache with them.
      tolerance: rounding of the outputs, relative to the largest entry.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple
    no_weights: tuple[str, ...] = ()
    axes: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    head: str = ""
    start: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None
    tolerance: float = 1e-5

    def decode(self, params: Any, *args: Any) -> Any:
        """Return logits made by prefill of all tokens but the last, and that one from the cache."""
        assert self.start and self.step
        *context, tokens = args
        cache, state = self.start(params, *context)
        first, cache = self.step(params, tokens[:, :-1], cache, 0, state)
        last, cache = self.step(params, tokens[:, -1:], cache, tokens.shape[1] - 1, state)
        return jnp.concatenate([first, last], 1)

    def weights(self) -> dict[str, Axes]:
        """Return what a person would call a weight, with its (in, out) axes."""
        matrices = {k: v for k, v in named_leaves(self.params).items() if v.ndim >= 2 and v.dtype == jnp.float32}
        leaves = {k: v for k, v in matrices.items() if k.split("/")[-1] not in ("bias", "scale")}
        for pattern in (*self.no_weights, *self.axes, *([self.head] if self.head else [])):
            assert any(matches(name, pattern) for name in leaves), pattern
        found = {}
        for name, leaf in leaves.items():
            if not any(matches(name, p) for p in self.no_weights):
                usual = (tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))
                found[name] = next((axes for p, axes in self.axes.items() if matches(name, p)), usual)
        return found


def filled(shapes: Any, seed: int = 0) -> Any:
    """Return parameters as after some training: nothing is zero, and every layer keeps the size of its input."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        x = rng.standard_normal(leaf.shape)
        if name in ("bias", "mean"):
            x = 0.1 * x
        elif name in ("scale", "var") or len(leaf.shape) < 2:
            x = 1 + 0.1 * np.abs(x)
        elif "embedding" not in name:
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)
