"""A method of a test's own: LoRA whose sum is multiplied by a trained gain along the out-axes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.methods.lora import LoRA
from rslora_jax.methods.method import aligned


@dataclasses.dataclass(frozen=True)
class Gained(LoRA):
    """`gain * (W + gamma A B)`, with a gain "m" of shape (*stack, *out)."""

    def factors(self, site: Any) -> Mapping[str, tuple]:
        return {**super().factors(site), "m": (*site.stack_axes, *site.out_axes)}

    def init(self, site: Any, key: Array, w: Any, config: Any) -> dict[str, Array]:
        return {**super().init(site, key, w, config), "m": jnp.ones(site.factor_shapes["m"], config.dtype)}

    def view(self, site: Any, w: Any, factors: Mapping[str, Array]) -> Any:
        return dataclasses.replace(super().view(site, w, factors), gain=aligned(site, factors)["m"])


def trained(adapters: dict, seed: int = 5) -> dict:
    """Adapters as after some training: the gain about one, B not zero."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.2 * jax.random.normal(k, leaf.shape, leaf.dtype) for (_, leaf), k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def by_hand(site: Any, w: Any, factors: Mapping[str, Array]) -> np.ndarray:
    """The weight that acts, by its definition, in float64."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    stack = site.sizes(site.stack_axes)
    a, b, m = (np.asarray(factors[name], np.float64) for name in "abm")
    a, b = a.reshape(*stack, site.in_size, site.rank), b.reshape(*stack, site.rank, site.out_size)
    total = np.transpose(np.asarray(w, np.float64), order).reshape(*stack, site.in_size, site.out_size)
    total = (total + site.alpha / np.sqrt(site.rank) * a @ b) * m.reshape(*stack, 1, site.out_size)
    return total.reshape(site.sizes(order)).transpose(np.argsort(order))


def gradients_by_hand(site: Any, w: Any, factors: Mapping[str, Array], dw: Any) -> dict[str, np.ndarray]:
    """The gradients of the factors by the chain rule, from that of the weight that acts."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    stack, gamma = site.sizes(site.stack_axes), site.alpha / np.sqrt(site.rank)

    def matrix(array: Any) -> np.ndarray:
        return np.transpose(np.asarray(array, np.float64), order).reshape(*stack, site.in_size, site.out_size)

    a, b, m = (np.asarray(factors[name], np.float64) for name in "abm")
    a, b = a.reshape(*stack, site.in_size, site.rank), b.reshape(*stack, site.rank, site.out_size)
    scaled = matrix(dw) * m.reshape(*stack, 1, site.out_size)
    found = {
        "a": gamma * scaled @ np.swapaxes(b, -1, -2),
        "b": gamma * np.swapaxes(a, -1, -2) @ scaled,
        "m": np.sum((matrix(w) + gamma * a @ b) * matrix(dw), -2),
    }
    return {name: array.reshape(site.factor_shapes[name]) for name, array in found.items()}
