"""The factor by which a learning rate serves every rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax.train.optimizers import make_optimizer
from rslora_jax.train.rates import frozen, lora_plus, scale_by_rank

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

PARAMS = {"low": jnp.ones((24, 30)), "high": jnp.ones((30, 26))}


def wrapped(**config):
    def fn(p, x):
        return jnp.tanh(x @ p["low"]) @ p["high"]

    return rslora.wrap(fn, PARAMS, jnp.ones((2, 24)), config=rslora.LoraConfig(alpha=7, **config))


def steps(lora, optimizer):
    """Train a little; return the adapters."""
    adapters = lora.init(jax.random.key(3), PARAMS)
    x = jax.random.normal(jax.random.key(4), (5, 24))

    def loss(adapters):
        return jnp.sum((lora.apply(PARAMS, adapters, x) - 1) ** 2)

    state = optimizer.init(adapters)
    for _ in range(3):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return adapters


@pytest.mark.parametrize(
    ("scaling", "power"),
    [("rslora", -0.25), ("lora", 0.0), ("constant", -0.5), (lambda rank: rank**-2.0, 0.5)],
    ids=["rslora", "lora", "constant", "square"],
)
def test_every_rank_is_trained_as_at_the_rate_that_suits_it(scaling, power):
    for rank in (3, 18):
        lora = wrapped(rank=rank, scaling=scaling)
        got = steps(lora, optax.chain(optax.adamw(2e-3, weight_decay=0.1), scale_by_rank(lora, reference_rank=5)))
        want = steps(lora, optax.adamw(2e-3 * (rank / 5) ** power, weight_decay=0.1))
        for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=2e-5, atol=1e-7)
        assert jax.tree.structure(got) == jax.tree.structure(lora.init(jax.random.key(0)))


def test_each_adapter_of_a_rank_pattern_has_its_own_factor():
    lora = wrapped(rank=3, rank_pattern={"high": 12}, alpha_pattern={"high": 50})
    updates, _ = scale_by_rank(lora).update(
        jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0))), optax.EmptyState()
    )
    for path, rank in (("low", 3), ("high", 12)):
        assert lora.sites[path].rank == rank
        np.testing.assert_allclose(updates[path]["a"], (rank / 8) ** -0.25, rtol=1e-6)
        np.testing.assert_allclose(updates[path]["b"], (rank / 8) ** -0.25, rtol=1e-6)


def test_a_reference_that_is_no_rank_is_refused():
    with pytest.raises(ValueError, match="reference_rank=0 is no rank"):
        scale_by_rank(wrapped(rank=3), reference_rank=0)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_is_another_rate_for_b_alone(method):
    lora = wrapped(rank=3, method=method)
    kinds = {"a": "in", "b": "out", "m": "magnitude"}
    assert lora.labels() == {p: {n: kinds[n] for n in s.factors} for p, s in lora.sites.items()}
    rates = {label: optax.adamw(0.02 * (5 if label == "out" else 1)) for label in ("in", "out", "magnitude")}
    want = steps(lora, optax.multi_transform(rates, lora.labels()))
    got = steps(lora, optax.chain(optax.adamw(0.02), lora_plus(lora, 5)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7), got, want)
    plain = steps(lora, optax.adamw(0.02))
    assert not np.allclose(plain["low"]["b"], got["low"]["b"])


@pytest.mark.parametrize("name", ["adam", "muon", "schedule_free_adamw", "adafactor"])
def test_what_is_frozen_stays_and_has_no_moments(name):
    lora = wrapped(rank=3)
    optimizer = frozen(lora, make_optimizer(name, schedule=0.02, clip=None, lora=lora), "in")
    start, end = lora.init(jax.random.key(3)), steps(lora, optimizer)
    for path in lora.sites:
        np.testing.assert_array_equal(end[path]["a"], start[path]["a"])
        assert np.abs(end[path]["b"]).max() > 0.01
    if name == "adam":
        held = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(start)) if leaf.ndim)
        assert held == 2 * sum(factors["b"].size for factors in start.values())


def test_nothing_that_is_not_there_is_frozen_nor_all():
    lora = wrapped(rank=3)
    with pytest.raises(ValueError, match="no array of these adapters is labelled 'magnitude': freeze one of in, out"):
        frozen(lora, optax.sgd(1.0), "magnitude")
    with pytest.raises(ValueError, match="with in, out frozen nothing is left to train"):
        frozen(lora, optax.sgd(1.0), "in", "out")


@pytest.mark.parametrize("ratio", [0, -1.0, float("inf"), float("nan")])
def test_no_ratio_of_rates_is_refused(ratio):
    with pytest.raises(ValueError, match="is no ratio of rates: give a number above 0"):
        lora_plus(wrapped(rank=3), ratio)
