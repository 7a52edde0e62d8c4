"""A program with weights of every kind, and what its adapters come to, by numpy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

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
LAYERS = 3
ALL = ["table", "layers/up", "layers/down", "experts", "kernel", "head"]


def kinds(p: Any, tokens: jax.Array) -> jax.Array:
    """Look up, scan layers whose kernels have three axes, mix experts, convolve in groups, and end in a head."""
    x = p["table"][tokens]

    def layer(x, w):
        return x + jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w["up"])).reshape(*x.shape[:2], 12) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, p["layers"])
    x = jnp.einsum("ebtd,edf->ebtf", jnp.stack([x, x - 1]), p["experts"]).sum(0)
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


SCALES = {"rslora": lambda r: r**-0.5, "lora": lambda r: 1 / r, "constant": lambda r: 1.0}

# What adapters may differ in: ranks, scales, targets, and layers of a scan apart.
configs = st.builds(
    dict,
    rank=st.integers(1, 7),
    alpha=st.sampled_from([0.5, 3, 10]),
    scaling=st.sampled_from(list(SCALES)),
    targets=st.tuples(st.sets(st.sampled_from(ALL)), st.sampled_from(["layers/up", "layers/{0,2}/up"])).map(
        lambda some: sorted(some[0] - {"layers/up"} | {some[1]})
    ),
    rank_pattern=st.sampled_from([{}, {"layers/*": 2}, {"layers/{1..2}/up": 5}]),
    alpha_pattern=st.sampled_from([{}, {"layers/*": 7}]),
)


def updates_of(config: Any, adapters: Any, sites: Any) -> dict[str, np.ndarray]:
    """Return gamma A B at each adapted weight, with each layer's own rank and gamma, from the config alone."""
    found = {}
    for path, factors in adapters.items():
        scanned = path.startswith("layers/")
        total = 0.0
        for n in range(LAYERS if scanned else 1):
            if path == "layers/up" and "layers/up" not in config["targets"] and n not in (0, 2):
                continue
            rank = 2 if "layers/*" in config["rank_pattern"] and scanned else config["rank"]
            rank = 5 if "layers/{1..2}/up" in config["rank_pattern"] and path == "layers/up" and n > 0 else rank
            alpha = 7 if config["alpha_pattern"] and scanned else config["alpha"]
            behind = factors["b"][:, :rank] if scanned or path == "experts" else factors["b"][:rank]
            own = {"a": factors["a"][..., :rank], "b": behind}
            one = update(sites[path], alpha * SCALES[config["scaling"]](rank), own)
            only = (np.arange(LAYERS) == n)[:, None, None] if scanned else 1.0
            total = total + only * one
        found[path] = total
    return found


def update(site: rslora.Site, gamma: float, factors: Any) -> np.ndarray:
    """Return gamma A B in float64, as stacks of matrices."""
    stack = [site.shape[n] for n in site.stack_axes]
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    rank = a.shape[-1]
    return gamma * a.reshape(*stack, -1, rank) @ b.reshape(*stack, rank, -1)
