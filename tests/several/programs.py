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


def pieces_of(config: Any, adapters: Any, sites: Any) -> dict[str, dict[int, tuple]]:
    """Return (gamma, A, B) of each element of a stack that is adapted, each layer's its own, from the config alone."""
    found: dict[str, dict[int, tuple]] = {}
    for path, factors in adapters.items():
        site, scanned = sites[path], path.startswith("layers/")
        a, b = (np.asarray(factors[name], np.float64) for name in "ab")
        count = int(np.prod([site.shape[n] for n in site.stack_axes]))
        a, b = a.reshape(count, -1, a.shape[-1]), b.reshape(count, a.shape[-1], -1)
        for n in range(count):
            if path == "layers/up" and "layers/up" not in config["targets"] and n not in (0, 2):
                continue
            rank = 2 if "layers/*" in config["rank_pattern"] and scanned else config["rank"]
            rank = 5 if "layers/{1..2}/up" in config["rank_pattern"] and path == "layers/up" and n > 0 else rank
            alpha = 7 if config["alpha_pattern"] and scanned else config["alpha"]
            gamma = alpha * SCALES[config["scaling"]](rank)
            found.setdefault(path, {})[n] = gamma, a[n, :, :rank], b[n, :rank]
    return found


def updates_of(config: Any, adapters: Any, sites: Any) -> dict[str, np.ndarray]:
    """Return gamma A B at each adapted weight, with each layer's own rank and gamma, from the config alone."""
    found = {}
    for path, pieces in pieces_of(config, adapters, sites).items():
        stack = [sites[path].shape[n] for n in sites[path].stack_axes]
        _, a, b = next(iter(pieces.values()))
        total = np.zeros((int(np.prod(stack)), len(a), b.shape[1]))
        for n, (gamma, a, b) in pieces.items():
            total[n] = gamma * a @ b
        found[path] = total.reshape(*stack, *total.shape[1:])
    return found


def update(site: rslora.Site, gamma: float, factors: Any) -> np.ndarray:
    """Return gamma A B in float64, as stacks of matrices."""
    stack = [site.shape[n] for n in site.stack_axes]
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    rank = a.shape[-1]
    return gamma * a.reshape(*stack, -1, rank) @ b.reshape(*stack, rank, -1)
