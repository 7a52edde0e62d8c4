"""What the tests compare with: numpy in float64, from the definitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rslora_jax as rslora
from rslora_jax.sites import path_name


def assert_near(actual: Any, expected: Any, tolerance: float, floor: float = 1e-30) -> None:
    """Compare trees entry by entry, relative to each expected array's largest entry, or to `floor` if that is more."""
    found = dict(jax.tree_util.tree_leaves_with_path(actual))
    for path, want in jax.tree_util.tree_leaves_with_path(expected):
        want, got = np.asarray(want, np.float64), np.asarray(found[path], np.float64)
        assert got.shape == want.shape, path
        error = np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), floor)
        assert error <= tolerance, (path, error)


def gradients_by_hand(lora: Any, adapters: dict, dw: Any) -> dict:
    """Return dA and dB by the chain rule from the gradient at the merged weights, and the sites' axes."""
    by_path = {path_name(p): g for p, g in jax.tree_util.tree_leaves_with_path(dw)}
    assert lora.config.scaling == "rslora"

    def one(name: str, site: Any) -> dict:
        order = (*site.stack_axes, *site.in_axes, *site.out_axes)

        def size(axes):
            return [site.shape[n] for n in axes]

        n_in, n_out = (int(np.prod(size(axes))) for axes in (site.in_axes, site.out_axes))
        stack, rank = size(site.stack_axes), site.rank
        g = np.transpose(np.asarray(by_path[name], np.float64), order).reshape(*stack, n_in, n_out)
        a = np.asarray(adapters[name]["a"], np.float64).reshape(*stack, n_in, rank)
        b = np.asarray(adapters[name]["b"], np.float64).reshape(*stack, rank, n_out)
        gamma = site.alpha / np.sqrt(rank)
        return {
            "a": (gamma * g @ np.swapaxes(b, -1, -2)).reshape(*stack, *size(site.in_axes), rank),
            "b": (gamma * np.swapaxes(a, -1, -2) @ g).reshape(*stack, rank, *size(site.out_axes)),
        }

    return {name: one(name, lora.sites[name]) for name in adapters}


def trained(lora: rslora.Lora, seed: int = 7, scale: float = 0.15) -> dict:
    """Return adapters as if trained, neither factor at its start; from numpy: JAX would compile for every shape."""
    rng = np.random.default_rng(seed)

    def draw(factor):
        return jnp.asarray(scale * rng.standard_normal(factor.shape), factor.dtype)

    return jax.tree.map(draw, jax.eval_shape(lora.init, jax.random.key(seed)))


def merged_by_hand(lora: rslora.Lora, params: Any, adapters: dict) -> Any:
    """Merge with numpy in float64, from the definition and nothing of the package but the sites' axes."""

    def one(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name not in adapters:
            return leaf
        site = lora.sites[name]
        config = lora.config
        assert config.alpha != config.rank
        stack, size = site.stack_axes, lambda axes: [site.shape[n] for n in axes]
        a = np.asarray(adapters[name]["a"], np.float64).reshape(*size(stack), -1, site.rank)
        b = np.asarray(adapters[name]["b"], np.float64).reshape(*size(stack), site.rank, -1)
        update = (site.alpha / np.sqrt(site.rank)) * (a @ b)
        order = (*stack, *site.in_axes, *site.out_axes)
        update = np.transpose(update.reshape(size(order)), np.argsort(order))
        return jnp.asarray(np.asarray(leaf, np.float64) + update).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)
