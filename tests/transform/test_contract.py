"""Einsums whose axes are made one, and the programs that XLA makes of their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.transform import contract as contracting
from rslora_jax.transform.contract import contract, neighbours
from tests.program_models import normal

SIZES = dict(zip("abcdeZ", (2, 3, 4, 5, 6, 7), strict=True))


@pytest.mark.parametrize(
    ("subscripts", "followers"),
    [
        ("abc,cZ->abZ", {"a": "b"}),
        ("abZ,Zde->abde", {"a": "b", "d": "e"}),
        ("abcd,cdZ->abZ", {"a": "b", "c": "d"}),
        ("abc,acZ->abZ", {}),  # a stack: `a` is in all terms, `b` is not
        ("abc,Zc->baZ", {}),  # the rows change places
        ("abc,cbZ->aZ", {}),  # summed over in two orders
        ("abcde,abdeZ->abcZ", {"a": "b", "d": "e"}),
    ],
)
def test_axes_are_made_one_where_they_stay_neighbours(subscripts, followers):
    left, right, out = subscripts.replace("->", ",").split(",")
    assert neighbours((left, right, out)) == followers
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal([SIZES[c] for c in term]).astype(np.float32) for term in (left, right))
    want = np.einsum(subscripts, x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(jax.jit(contract, static_argnums=0)(subscripts, x, y), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("back", [False, True])
def test_gradients_need_no_transposed_copy_and_are_formed_with_the_rank_first(back):
    batch, length, width, out, rank = 4, 96, 128, 160, 6
    params, x = {"w": normal(0, width, out)}, normal(1, batch, length, width)

    def up(p, x):
        return jnp.tanh(jnp.tanh(x) @ p["w"])

    fn = (lambda p, x: jnp.tanh(up(p, x) @ p["w"].T)) if back else up  # tied: there the data meets B first
    lora = rslora.wrap(fn, params, x, config=rslora.LoraConfig(rank=rank, alpha=4))
    step = jax.jit(jax.grad(lambda a, x: jnp.sin(lora.apply(params, a, x)).sum(), argnums=(0, 1)))
    text = step.lower(lora.init(jax.random.key(0)), x).compile().as_text()
    rows = batch * length
    assert not re.search(rf"f32\[({width}|{out}),({rows}|{batch},{length})\]", text)
    products = {in_memory(*found) for found in re.findall(r"= f32\[([\d,]+)\]\{([\d,]+)\} dot\(", text)}
    assert (rank, width) in products and (rank, out) in products
    assert (width, rank) not in products and (out, rank) not in products


@pytest.mark.parametrize(
    ("platform", "from_rank", "forward", "backward"),
    [("cpu", 3, 0, 2), ("gpu", 3, 1, 2), ("gpu", 4, 0, 0), ("tpu", 3, 0, 0)],
)
def test_each_platform_has_the_barriers_that_help_there(monkeypatch, platform, from_rank, forward, backward):
    monkeypatch.setattr(contracting, "APART_FROM_RANK", from_rank)
    params, x = {"w": normal(0, 12, 8)}, normal(1, 4, 12)  # so few rows that all is factored
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, x, config=rslora.LoraConfig(rank=3, alpha=4))
    adapters = jax.tree.map(lambda a: normal(2, *a.shape), lora.init(jax.random.key(0)))
    there = lora.on(platform)
    jax.clear_caches()  # what was traced with another threshold

    def apply(a, x):
        return there.apply(params, a, x)

    def loss(a, x):
        return jnp.sin(apply(a, x)).sum()

    programs = [jax.make_jaxpr(f)(adapters, x) for f in (apply, jax.grad(loss, argnums=(0, 1)))]
    merged = np.asarray(lora.merge(params, adapters)["w"], np.float64)
    got, (dx, _) = apply(adapters, x), jax.grad(lambda x, a: loss(a, x), argnums=(0, 1))(x, adapters)
    found = [str(program).count("optimization_barrier") for program in programs]
    assert found == [forward, forward + backward]
    want = np.asarray(x, np.float64) @ merged
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, np.cos(want) @ merged.T, rtol=1e-4, atol=1e-4)


def in_memory(shape, minor_to_major):
    """Return a shape in the order in which XLA lays it out."""
    sizes = shape.split(",")
    return tuple(int(sizes[int(n)]) for n in reversed(minor_to_major.split(",")))
