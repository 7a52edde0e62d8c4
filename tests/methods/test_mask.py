"""What a view drops of the data that its adapter sees: the same in value, gradient and remat, another by layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax.methods.lora import LoRA
from tests.program_models import normal

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

RATE, SIZE = 0.3, 48


@dataclasses.dataclass(frozen=True)
class Dropping(LoRA):
    """LoRA with a mask on its data, of a key for each element of the stack."""

    def view(self, site: Any, w: Any, factors: Mapping[str, Any]) -> Any:
        stack = site.sizes(site.stack_axes)
        keys = jax.random.key_data(jax.random.split(jax.random.key(3), stack or (1,)))
        along = {"mask": keys.reshape(*stack, *(1 for _ in range(len(site.shape) - len(stack))), -1)}
        return dataclasses.replace(super().view(site, w, factors), along=along, rate=RATE)


def adapted(fn, w, x, **config):
    """The function on weights of zeros, with factors that are the identity: what is left is the data seen."""
    of = rslora.LoraConfig(rank=SIZE, alpha=1, scaling="constant", method=Dropping(), **config)
    lora = rslora.wrap(fn, {"w": w}, x, config=of)
    return lora, {"w": {n: jnp.broadcast_to(jnp.eye(SIZE), s) for n, s in lora.sites["w"].factor_shapes.items()}}


def test_a_part_of_the_data_is_zero_and_the_rest_is_larger():
    x = 1 + jnp.abs(normal(0, 400, SIZE))
    lora, adapters = adapted(lambda p, x: x @ p["w"], jnp.zeros((SIZE, SIZE)), x)
    seen = np.asarray(lora.apply({"w": jnp.zeros((SIZE, SIZE))}, adapters, x))
    kept = seen != 0
    np.testing.assert_allclose(seen[kept], (np.asarray(x) / (1 - RATE))[kept], rtol=1e-6)
    assert abs(kept.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / kept.size)


def test_gradients_are_those_of_the_mask_that_the_value_had():
    w, x = normal(4, SIZE, SIZE), normal(0, 30, SIZE)

    def fn(p, x):
        return jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(x)

    lora, adapters = adapted(fn, w, x)
    zeros = {"w": jnp.zeros((SIZE, SIZE))}
    # A mask is told by its place in the program: the same equations, but for the sine.
    plain, _ = adapted(lambda p, x: jax.checkpoint(lambda x: x @ p["w"])(x), w, x)
    kept = (np.asarray(plain.apply(zeros, adapters, x)) != 0) / (1 - RATE)

    def by_hand(ab, x):
        return jnp.sum(jnp.sin(x @ w + (x * kept) @ ab["a"] @ ab["b"]))

    got = jax.jit(jax.grad(lambda ab, x: jnp.sum(lora.apply({"w": w}, {"w": ab}, x)), (0, 1)))(adapters["w"], x)
    want = jax.grad(by_hand, (0, 1))(adapters["w"], x)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_every_layer_of_a_scan_has_its_own():
    x = 1 + jnp.abs(normal(0, 30, SIZE))

    def fn(p, x):
        return lax.scan(lambda c, w: (c, c @ w), x, p["w"])[1]

    lora, adapters = adapted(fn, jnp.zeros((3, SIZE, SIZE)), x)
    kept = np.asarray(lora.apply({"w": jnp.zeros((3, SIZE, SIZE))}, adapters, x)) != 0
    together = [(kept[n] & kept[m]).mean() for n, m in ((0, 1), (1, 2), (0, 2))]
    np.testing.assert_allclose(together, (1 - RATE) ** 2, atol=0.05)


def test_a_look_up_drops_no_index():
    rows = jnp.arange(SIZE)
    lora, adapters = adapted(lambda p, at: p["w"][at], jnp.zeros((SIZE, SIZE)), rows, targets="*")
    np.testing.assert_array_equal(lora.apply({"w": jnp.zeros((SIZE, SIZE))}, adapters, rows), np.eye(SIZE))
