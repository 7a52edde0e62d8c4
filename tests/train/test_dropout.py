"""Training with dropout: a mask for each step, part and device, and resumed runs go on as if they had not stopped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax.store import checkpoint
from rslora_jax.train import TrainState, fit, make_step
from rslora_jax.train.state import make_evaluate
from tests.program_models import normal
from tests.reference import trained

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

PARAMS = {"v": normal(0, 8, 8), "w": normal(1, 8, 5)}
BATCHES = [np.asarray(normal(n, 4, 8)) for n in range(2, 8)]


def fn(p, x):
    return jnp.tanh(x @ p["v"]) @ p["w"]


def squares(run, x):
    return jnp.sum((run(x) - 1) ** 2), jnp.float32(x.shape[0])


def wrapped(**config):
    of = rslora.LoraConfig(rank=3, alpha=7, **config)
    return rslora.wrap(fn, PARAMS, jnp.ones((2, 8)), config=of)


def test_a_step_draws_by_its_number_and_part_and_the_optimiser_sees_that_gradient():
    lora, optimizer, key = wrapped(dropout=0.4), optax.sgd(0.1), jax.random.key(3)
    state = TrainState.create(trained(lora), optimizer, dropout_key=key)
    step = make_step(lora, squares, optimizer, accumulate=2)
    for n, x in enumerate(BATCHES[:3]):
        before = jax.tree.map(jnp.copy, state.adapters)

        def mean(adapters, x=x, n=n):
            own = jax.random.fold_in(key, n)
            parts = [(x[m::2], jax.random.fold_in(own, m)) for m in range(2)]
            return (
                sum(squares(functools.partial(lora.apply, PARAMS, adapters, dropout_key=k), p)[0] for p, k in parts) / 4
            )

        want = jax.tree.map(lambda a, g: a - 0.1 * g, before, jax.grad(mean)(before))
        state, _ = step(state, PARAMS, x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), state.adapters, want)


def test_evaluation_drops_nothing():
    lora, plain = wrapped(dropout=0.4), wrapped()
    adapters = trained(lora)
    got = make_evaluate(lora, squares)(PARAMS, adapters, BATCHES[0])
    np.testing.assert_array_equal(got, make_evaluate(plain, squares)(PARAMS, adapters, BATCHES[0]))


def test_a_state_without_a_key_is_refused():
    lora = wrapped(dropout=0.4)
    state = TrainState.create(lora.init(jax.random.key(0)), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"dropout=0.4, and the state has no key .* dropout_key=jax.random.key\(0\)"):
        make_step(lora, squares, optax.sgd(0.1))(state, PARAMS, BATCHES[0])


def test_a_resumed_run_goes_on_with_its_masks_and_another_rate_is_refused(tmp_path):
    def run(folder, steps, dropout=0.4, **more):
        lora = wrapped(dropout=dropout)
        more = dict(batches=BATCHES, loss=squares, optimizer=optax.adam(0.1), show=False, folder=folder) | more
        return fit(lora, PARAMS, trained(lora), steps=steps, dropout_key=jax.random.key(5), **more)

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "parts", 6, resume=True).adapters, whole.adapters)
    plain = run(tmp_path / "plain", 6, dropout=0.0)
    assert not np.array_equal(plain.adapters["w"]["b"], whole.adapters["w"]["b"])
    with pytest.raises(ValueError, match="dropout"):
        run(tmp_path / "parts", 8, dropout=0.3, resume=True)
    assert checkpoint.load_adapters(tmp_path / "whole")[0].dropout == 0.4
