"""One step: taken in parts, passed over, drawn at random, and under pmap, beside the merged model by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rslora_jax import train
from tests.train.tiny import Run

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.xdist_group("fit"), pytest.mark.usefixtures("compile_fast")]


@pytest.fixture(scope="module")
def run():
    run = Run()
    run.adapters = jax.tree.map(lambda x: x + 0.02, run.adapters)
    run.batch = train.train_batches(run.rows, batch_size=6)[2]
    return run


def near(got, want, tolerance):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=tolerance * np.abs(w).max()), got, want)


@functools.cache
def by_hand():
    """The gradient of the merged model's mean loss, in one piece."""
    run = Run()
    adapters = jax.tree.map(lambda x: x + 0.02, run.adapters)
    batch = train.train_batches(run.rows, batch_size=6)[2]

    def mean(adapters):
        total, count = run.loss(lambda *a, **k: run.lora.fn(run.lora.merge(run.params, adapters), *a, **k), batch)
        return total / count

    return jax.jit(jax.value_and_grad(mean))(adapters)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_batch_in_parts_is_the_whole_batch(run, parts):
    value, grads = by_hand()
    tokens = run.batch.loss_mask_BxT.sum(1)
    assert len(set(tokens.tolist())) > 1, "parts of equal counts would hide a mean of means"
    optimizer = optax.sgd(1.0)
    step = train.make_step(run.lora, run.loss, optimizer, accumulate=parts)
    state, metrics = step(train.TrainState.create(run.adapters, optimizer), run.params, run.batch)
    near(jax.tree.map(jnp.subtract, run.adapters, state.adapters), grads, 2e-5)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert int(metrics["tokens"]) == tokens.sum()


def test_parts_take_less_memory(run):
    def temporary(parts):
        step = train.make_step(run.lora, run.loss, optax.sgd(1.0), accumulate=parts)
        batch = jax.tree.map(lambda rows: np.concatenate([rows] * 4), run.batch)
        state = jax.eval_shape(lambda: train.TrainState.create(run.adapters, optax.sgd(1.0)))
        return step.lower(state, run.params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4) < 0.5 * temporary(1)


def test_rows_that_do_not_divide_are_refused(run):
    step = train.make_step(run.lora, run.loss, optax.sgd(1.0), accumulate=4)
    with pytest.raises(ValueError, match=r"shape \(6, 24\) cannot be taken in 4 parts"):
        step(train.TrainState.create(run.adapters, optax.sgd(1.0)), run.params, run.batch)


def regression():
    import rslora_jax as rslora

    w = {"w": jax.random.normal(jax.random.key(3), (5, 7))}
    lora = rslora.wrap(
        lambda p, x: x @ p["w"], w, jnp.ones((2, 5)), config=rslora.LoraConfig(rank=3, alpha=7, targets=["w"])
    )
    return lora, w, lora.init(jax.random.key(0))


def squares(run, batch):
    return jnp.sum((run(batch) - 1) ** 2), jnp.float32(batch.size)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_a_batch_that_is_not_finite_is_passed_over(bad):
    lora, w, adapters = regression()
    optimizer = optax.adam(1e-2)
    good = np.ones((2, 5), np.float32)
    step = train.make_step(lora, squares, optimizer, skip=True)
    state = train.TrainState.create(adapters, optimizer)
    seen = []
    for batch in (good, good * bad, good * bad, good):
        state, metrics = step(state, w, batch)
        seen.append(int(metrics["skipped"]))
    assert seen == [0, 1, 2, 0] and int(state.step) == 4
    want = train.TrainState.create(adapters, optimizer)
    for batch in (good, good):
        want, _ = step(want, w, batch)
    jax.tree.map(np.testing.assert_array_equal, (state.adapters, state.opt_state), (want.adapters, want.opt_state))


def test_a_loss_draws_anew_at_every_step_and_the_same_when_run_again():
    lora, w, adapters = regression()

    def drawn(run, batch, key):
        return (
            jnp.sum(run(batch) ** 2) + jax.random.normal(key),
            jnp.float32(1),
        )

    def losses(parts):
        step = train.make_step(lora, drawn, optax.sgd(0.0), accumulate=parts)
        state = train.TrainState.create(adapters, optax.sgd(0.0), jax.random.key(5))
        values = []
        for _ in range(3):
            state, metrics = step(state, w, np.ones((2, 5), np.float32))
            values.append(float(metrics["loss"]))
        return values

    assert len(set(losses(1))) == 3 and losses(1) == losses(1)
    one, two = (losses(2)[n] - losses(2)[0] for n in (1, 2))
    assert one != two != 0, "the parts of a batch draw apart too"


def test_a_step_in_lower_precision_keeps_float32_adapters_and_moments():
    lora, w, adapters = regression()
    w = {"w": w["w"].astype(jnp.bfloat16)}
    optimizer = optax.adamw(1e-2)
    step = train.make_step(lora, squares, optimizer)
    state, _ = step(train.TrainState.create(adapters, optimizer), w, jnp.ones((2, 5), jnp.bfloat16))
    for tree in (state.adapters, state.opt_state[0].mu, state.opt_state[0].nu):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_may_have_scalars(parts, tmp_path):
    """A scalar goes whole to each part, lies whole on a mesh, and its FLOPs can be counted."""
    from rslora_jax.parallel import sharding
    from rslora_jax.train.batch_stream import lay_out
    from rslora_jax.train.speed import count_flops

    lora, w, adapters = regression()
    rows = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")

    def weighted(run, batch):
        return (
            batch["scale"] * jnp.sum((run(batch["x"]) - batch["shift"]) ** 2) + batch["none"].sum(),
            jnp.float32(batch["x"].size),
        )

    batch = {"x": rows, "scale": 0.5, "shift": np.float32(2), "none": np.zeros((4, 0), np.float32)}
    optimizer = optax.sgd(1.0)
    state = train.TrainState.create(adapters, optimizer)
    assert count_flops(lora, weighted, w, state, batch, parts) == count_flops(
        lora, lambda run, x: squares(run, x), w, state, rows, parts
    )
    state, metrics = train.make_step(lora, weighted, optimizer, accumulate=parts)(state, w, batch)

    def weight(ab):
        return w["w"] + 7 / np.sqrt(3) * ab["w"]["a"] @ ab["w"]["b"]

    def by_hand(ab):
        return 0.5 * jnp.sum((rows @ weight(ab) - 2) ** 2) / 20

    value, grads = jax.value_and_grad(by_hand)(adapters)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    near(jax.tree.map(jnp.subtract, adapters, state.adapters), grads, 2e-5)
    laid = lay_out(batch, sharding.batch_sharding(sharding.make_mesh("data=-1")))
    assert laid["scale"].shape == () and laid["scale"].is_fully_replicated
