"""Adapters in bfloat16 with float32 masters, beside the same training in float32 and by hand."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax.train import TrainState, make_step
from rslora_jax.train.masters import float32_masters

pytestmark = [pytest.mark.usefixtures("compile_fast")]

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"w": jax.random.normal(KEYS[0], (24, 30)) / 5}
X = jax.random.normal(KEYS[1], (64, 24))
Y = X @ (PARAMS["w"] + jax.random.normal(KEYS[2], (24, 30)) / 50)
CHOICES = {
    "adam": optax.adam(1e-4),
    "clip, decay": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-4, weight_decay=0.1)),
    "plateau": optax.chain(optax.sgd(1e-2, momentum=0.9), optax.contrib.reduce_on_plateau(patience=2)),
}


def wrapped(dtype):
    config = rslora.LoraConfig(rank=3, alpha=7, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)
        return rslora.wrap(lambda p, x: x @ p["w"], PARAMS, X, config=config)


def start(dtype):
    """The same numbers for all dtypes."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), wrapped("bfloat16").init(KEYS[0]))


def trained(dtype, optimizer, steps=60):
    """Train; return the adapters and the optimiser's state."""
    lora = wrapped(dtype)

    def loss(a):
        return jnp.mean((lora.apply(PARAMS, a, X) - Y) ** 2)

    @jax.jit
    def step(a, state):
        value, grads = jax.value_and_grad(loss)(a)
        updates, state = optax.with_extra_args_support(optimizer).update(grads, state, a, value=value)
        return optax.apply_updates(a, updates), state

    adapters = start(dtype)
    state = optimizer.init(adapters)
    for _ in range(steps):
        adapters, state = step(adapters, state)
    return adapters, state


@pytest.mark.parametrize("name", list(CHOICES))
def test_masters_go_where_float32_goes_and_the_adapters_are_they_rounded(name):
    whole, _ = trained("float32", CHOICES[name])
    rounded, state = trained("bfloat16", float32_masters(CHOICES[name]))
    alone, _ = trained("bfloat16", CHOICES[name])
    for factor in "ab":
        master = state.parameters["w"][factor]
        assert master.dtype == jnp.float32 and rounded["w"][factor].dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded["w"][factor], master.astype(jnp.bfloat16))

    def moved(tree):
        return np.asarray(tree["w"]["a"], np.float64) - np.asarray(start("float32")["w"]["a"])

    def near(tree):
        return np.linalg.norm(moved(tree) - moved(whole)) / np.linalg.norm(moved(whole))

    assert near(state.parameters) < 0.01 < 0.5 < near(alone)  # alone, most steps are rounded away


def test_parameters_in_float32_are_trained_as_without():
    whole, _ = trained("float32", CHOICES["adam"])
    other, _ = trained("float32", float32_masters(CHOICES["adam"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), whole, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_may_give_its_state_away(dtype):
    lora, optimizer = wrapped(dtype), float32_masters(optax.adam(1e-3))

    def squares(run, batch):
        return (jnp.sum((run(batch) - Y) ** 2), jnp.float32(batch.size))

    state, step = TrainState.create(lora.init(KEYS[0]), optimizer), make_step(lora, squares, optimizer)
    losses = []
    for _ in range(5):
        state, metrics = step(state, PARAMS, X)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and state.adapters["w"]["a"].dtype == dtype


def test_adapters_in_few_bits_are_a_warning_that_says_what_to_do():
    def fn(p, x):
        return x @ p["w"]

    for dtype in ("bfloat16", "float16"):
        with pytest.warns(rslora.RsloraWarning, match=f"held in {dtype} lose small steps .*float32_masters") as said:
            rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7, dtype=dtype))
        assert len([w for w in said if w.category is rslora.RsloraWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", rslora.RsloraWarning)
        rslora.wrap(fn, PARAMS, X, config=rslora.LoraConfig(rank=3, alpha=7))


# `merge` and donation.


def test_a_copied_merge_may_be_given_away_and_one_that_shares_takes_the_base_with_it():
    params = {"w": PARAMS["w"] + 0, "bias": jnp.arange(30.0), "on host": np.ones(3), "name": "a"}
    lora = rslora.wrap(lambda p, x: x @ p["w"] + p["bias"], params, X, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = lora.init(KEYS[0])

    def arrays(tree):
        return {k: tree[k] for k in ("w", "bias", "on host")}

    give = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf + 1, p), donate_argnums=0)
    copied = lora.merge(params, adapters, copy=True)
    assert jax.tree.structure(copied) == jax.tree.structure(params) and copied["name"] == "a"
    assert isinstance(copied["on host"], np.ndarray) and copied["on host"] is not params["on host"]
    give(arrays(copied))
    np.testing.assert_array_equal(params["bias"], np.arange(30.0))
    assert jnp.isfinite(lora.apply(params, adapters, X)).all()
    shared = lora.merge(params, adapters)
    assert shared["bias"] is params["bias"] and shared["w"] is not params["w"]
    give(arrays(shared))
    assert params["bias"].is_deleted() and not params["w"].is_deleted()
    traced = jax.eval_shape(lambda p: lora.merge(p, adapters, copy=True), arrays(params | {"bias": jnp.ones(30)}))
    assert traced["bias"].shape == (30,)
