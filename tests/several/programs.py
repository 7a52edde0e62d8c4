"""A program with weights of every kind, and what its adapters come to, by numpy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rslora_jax as rslora
from tests.program_models import normal

PARAMS = {
    "table": normal(0, 20, 8),
    "layers": {"up": normal(1, 3, 8, 4, 3), "down": normal(2, 3, 12, 8)},
    "experts": normal(3, 2, 8, 8),
    "kernel": normal(4, 3, 4, 8),
    "head": normal(5, 8, 20),
}
TOKENS = jnp.arange(12).reshape(2, 6) % 20
ALL = ["table", "layers/up", "layers/down", "experts", "kernel", "head"]


def kinds(p: Any, tokens: jax.Array) -> jax.Array:
    """Look up, scan layers whose kernels have three axes, mix experts, convolve in groups, and end in a head."""
    x = p["table"][tokens]

    def layer(x, w):
        return x + jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w["up"])).reshape(*x.shape[:2], 12) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, p["layers"])
    x = jnp.einsum("ebtd,edf->btf", jnp.stack([x, x - 1]), p["experts"])
    spec = ("NWC", "WIO", "NWC")
    x = jax.lax.conv_general_dilated(
        x, p["kernel"], (1,), "SAME", dimension_numbers=spec, feature_group_count=p["kernel"].shape[-1] // 4
    )
    return jnp.tanh(x) @ p["head"]


def wrapped(**config: Any) -> rslora.Lora:
    return rslora.wrap(kinds, PARAMS, TOKENS, config=rslora.LoraConfig(**{"targets": ALL} | config))


def drawn(lora: rslora.Lora, seed: int, dtype: Any = np.float32) -> dict:
    """Return adapters as if trained, of numpy arrays."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return (0.3 * rng.standard_normal(shape)).astype(dtype)

    return {p: {n: draw(shape) for n, shape in site.factor_shapes.items()} for p, site in lora.sites.items()}


def update(site: rslora.Site, gamma: float, factors: Any) -> np.ndarray:
    """Return gamma A B in float64, as stacks of matrices."""
    stack = [site.shape[n] for n in site.stack_axes]
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    rank = a.shape[-1]
    return gamma * a.reshape(*stack, -1, rank) @ b.reshape(*stack, rank, -1)
