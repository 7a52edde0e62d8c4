"""What is a weight and what is not, by how a program uses it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import rslora_jax as rslora
from tests.program_models import normal


def found(fn, params, x=None):
    """The weights that `fn` is found to use, by kind."""
    x = normal(9, 5, 12) if x is None else x
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7, targets=["*"]))
    return {name: site.kind for name, site in lora.sites.items()}


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


@jax.custom_vjp
def rounded(w):
    return jnp.round(4 * w) / 4


rounded.defvjp(lambda w: (rounded(w), None), lambda _, dw: (dw,))

W = {"w": normal(0, 12, 16)}


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: (x + p["position"]) @ p["w"],
        lambda p, x: (p["position"] + x * p["position"]) @ p["w"],
        lambda p, x: (x * p["position"][:, :1]) @ p["w"],
        lambda p, x: jnp.concatenate([p["position"][:1], x]) @ p["w"],
        lambda p, x: jnp.where(x > 0, p["position"], 0) @ p["w"],
        lambda p, x: (x + jnp.take(p["position"], jnp.arange(5) % 3, axis=0, mode="clip")[::-1].at[0].add(1)) @ p["w"],
    ],
)
def test_what_is_added_to_data_or_put_beside_it_is_no_weight(fn):
    kinds = found(fn, {**W, "position": normal(1, 5, 12)})
    assert kinds.pop("position", "embedding") == "embedding"
    assert kinds == {"w": "linear"}


def test_latent_queries_are_no_weight_once_they_are_computed_with():
    def fn(p, x):
        return jax.nn.softmax((normalise(p["queries"]) @ p["w"]) @ (x @ p["w"]).T) @ x

    assert found(fn, {**W, "queries": normal(1, 4, 12)}) == {"w": "linear"}


@pytest.mark.parametrize(
    "through",
    [
        rounded,
        jax.nn.softplus,
        jnp.tanh,
        normalise,
        lambda w: w / jnp.linalg.norm(w, axis=0),
        lambda w: jnp.where(jnp.arange(16) > 3, w, 0),
        lambda w: jnp.where(normal(0, 12, 16) > 0, w, 0.0),
        lambda w: jnp.sort(w, axis=0),
        lambda w: jax.jit(lambda w: jnp.clip(w, -1, 1))(w),
        lambda w: lax.cond(True, lambda w: w, lambda w: 2 * w, w),
    ],
)
def test_a_weight_is_found_through_what_is_computed_from_it_alone(through):
    with pytest.warns(rslora.RsloraWarning, match="materialised"):
        assert found(lambda p, x: x @ through(p["w"]), W) == {"w": "linear"}


def test_a_stack_that_is_indexed_is_a_stack_and_a_table_a_table():
    which = jnp.array([0, 2, 1, 1, 0])
    stack = {"w": normal(0, 3, 12, 16)}

    def by_row(p, x):
        return jnp.einsum("ti,tio->to", x, p["w"][which])

    def table(p, x):
        return jnp.einsum("thi,hi->t", p["w"][which], jnp.ones((12, 16)))

    lora = rslora.wrap(by_row, stack, normal(9, 5, 12), config=rslora.LoraConfig(rank=3, alpha=7))
    assert (lora.sites["w"].stack_axes, lora.sites["w"].in_axes, lora.sites["w"].out_axes) == ((0,), (1,), (2,))
    assert found(table, stack) == {"w": "embedding"}


def test_convolutions_are_named_not_taken():
    def fn(p, x):
        return lax.conv(x, p["kernel"], (1,), "SAME").reshape(5, -1) @ p["w"]

    params, x = {"w": normal(0, 12, 16), "kernel": normal(1, 3, 2, 3)}, normal(9, 5, 2, 4)
    assert found(fn, params, x) == {"kernel": "convolution", "w": "linear"}
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7))
    assert list(lora.sites) == ["w"]
    named = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=3, alpha=7, targets=["kernel"]))
    assert named.init(jax.random.key(0))["kernel"]["a"].shape == (2, 3, 3)
    assert named.init(jax.random.key(0))["kernel"]["b"].shape == (3, 3)
