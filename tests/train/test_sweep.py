"""Runs together beside the same runs alone, by `make_step`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.models.decoder import Decoder
from rslora_jax.train.bytelevel import ByteTokenizer
from rslora_jax.train.sweep import (
    Trial,
    make_sweep_evaluate,
    make_sweep_step,
    mean_loss,
    scaling_factors,
    stack,
    starting_states,
    sweep,
)
from tests.train.tiny import CONFIG, SUMS

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.xdist_group("fit"), pytest.mark.usefixtures("compile_fast")]

LAYERS, WIDTH, STEPS = 3, 6, 4
TRIALS = [
    Trial(3e-3),
    Trial(1e-2, seed=1, scaling="lora"),
    Trial(2e-2, seed=2, scaling=lambda rank: rank**-0.25),
    Trial(1e-2, seed=1, scaling="rslora"),
]


def layers(params, x):
    """A scan of layers, so that each weight is a stack."""

    def one(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return lax.scan(one, x, params)[0]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(9))
    up = jax.random.normal(keys[0], (LAYERS, WIDTH, 11)) / 3
    return {"up": up, "down": jax.random.normal(keys[1], (LAYERS, 11, WIDTH)) / 3}


def wrapped(params, scaling="rslora"):
    """Ranks and alphas that differ between weights."""
    config = rslora.LoraConfig(
        rank=3, alpha=7, scaling=scaling, rank_pattern={"up": 5}, alpha_pattern={"down": 2}, targets=["*"]
    )
    return rslora.wrap(layers, params, jnp.ones((2, WIDTH)), config=config)


def squares(run, batch):
    x, y = batch
    return jnp.sum((run(x) - y) ** 2), jnp.float32(y.size)


class Data:
    """Batches by number, another order for each seed."""

    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, n):
        draw = np.random.default_rng([self.seed, n]).normal
        return draw(size=(5, WIDTH)).astype("float32"), draw(size=(5, WIDTH)).astype("float32")


def adamw(rate):
    return train.make_optimizer("adamw", schedule=rate, options={"weight_decay": 0.1})


def warmed_sgd(rate):
    shape = train.make_schedule("linear", peak=1.0, steps=STEPS, warmup=0.5)
    return train.make_optimizer("sgd", schedule=lambda step: rate * shape(step), options={"momentum": 0.9})


def adafactor(rate):
    return train.make_optimizer("adafactor", schedule=rate)


def alone(step, lora, params, trial, optimizer, data):
    state, seen = train.TrainState.create(lora.init(jax.random.key(trial.seed)), optimizer), []
    for n in range(STEPS):
        state, metrics = step(state, params, data[n])
        seen.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    return np.array(seen).T, state.adapters


def assert_equal(outcome, want):
    (losses, norms), adapters = want
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(outcome.grad_norms, norms, rtol=1e-4)

    def near(got, want):
        return np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())

    jax.tree.map(near, outcome.adapters, adapters)
    assert outcome.diverged is None


@pytest.mark.parametrize("optimizer, trials", [(adamw, TRIALS), (warmed_sgd, TRIALS[:2]), (adafactor, TRIALS[1:3])])
def test_runs_together_are_the_runs_alone(params, optimizer, trials):
    held, evaluate = [Data(77)[0], Data(78)[0]], jax.jit(layers)
    found = sweep(
        wrapped(params),
        params,
        trials,
        batches=Data,
        loss=squares,
        optimizer=optimizer,
        steps=STEPS,
        heldout=held,
        evaluate_at=(0, STEPS),
    )
    assert [outcome.trial for outcome in found] == trials
    for outcome in found:
        t = outcome.trial
        lora = wrapped(params, t.scaling or "rslora")
        one = optimizer(t.learning_rate)
        want = alone(train.make_step(lora, squares, one), lora, params, t, one, Data(t.seed))
        assert_equal(outcome, want)
        for at, weights in ((0, params), (STEPS, lora.merge(params, want[1]))):
            errors = [np.mean((evaluate(weights, x) - y) ** 2) for x, y in held]
            assert outcome.heldout[at].loss == pytest.approx(np.mean(errors), rel=1e-5)
            assert outcome.heldout[at].error == pytest.approx(np.std(errors, ddof=1) / np.sqrt(2), rel=1e-3)
    assert len({outcome.heldout[STEPS].loss for outcome in found}) == len(trials)


@pytest.mark.nightly  # the decoder also runs in tests/test_rank_sweep.py
def test_runs_of_a_decoder_together_are_the_runs_alone():
    config = dataclasses.replace(CONFIG, width=16, mlp_width=24, num_layers=1, scan_layers=True)
    model, tokens = Decoder(config), jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    rows = train.prepare(ByteTokenizer(), SUMS, max_len=24)
    loss, batches = train.token_loss(rows.places), lambda seed: train.train_batches(rows, batch_size=3, seed=seed)
    loras = {
        scaling: rslora.wrap(
            model.apply,
            params,
            tokens,
            config=rslora.LoraConfig(rank=5, alpha=7, scaling=scaling, targets="*/{q,down}_proj/kernel"),
        )
        for scaling in ("rslora", "lora")
    }
    trials = [Trial(rate, seed=seed, scaling=s) for s in loras for rate, seed in ((3e-3, 0), (2e-2, 1))]
    found = sweep(loras["rslora"], params, trials, batches=batches, loss=loss, optimizer=optax.adam, steps=STEPS)
    # With the rate in the state, one compilation serves both rates.
    optimizers = {rate: optax.inject_hyperparams(optax.adam)(rate) for rate in (3e-3, 2e-2)}
    update, steps = optimizers[3e-3].update, {}
    for outcome in found:
        t = outcome.trial
        one = optax.GradientTransformation(optimizers[t.learning_rate].init, update)
        step = steps.setdefault(t.scaling, train.make_step(loras[t.scaling], loss, one))
        assert_equal(outcome, alone(step, loras[t.scaling], params, t, one, batches(t.seed)))


def test_a_trial_that_diverges_disturbs_no_other(params):
    lora, seen = wrapped(params), []

    def go(trials, **options):
        return sweep(lora, params, trials, batches=Data, loss=squares, optimizer=optax.sgd, steps=STEPS, **options)

    trials = [Trial(1e-2), Trial(1e30, seed=1), Trial(2e-2, seed=2)]
    mixed = go(trials, progress=lambda done, steps: seen.append((done, steps)))
    fine = go([trials[0], trials[2], Trial(1e-2, seed=1)])
    assert seen == [(n + 1, STEPS) for n in range(STEPS)]
    assert mixed[1].diverged == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(mixed[1].adapters))
    for got, want in ((mixed[0], fine[0]), (mixed[2], fine[1])):
        np.testing.assert_array_equal(got.losses, want.losses)
        jax.tree.map(np.testing.assert_array_equal, got.adapters, want.adapters)
        assert got.diverged is None


def test_the_factor_norm_is_the_mean_over_layers_and_factors(params):
    lora = wrapped(params)
    found = sweep(lora, params, TRIALS[:2], batches=Data, loss=squares, optimizer=optax.sgd, steps=1)
    for outcome, scaling in zip(found, ("rslora", "lora"), strict=True):
        of = wrapped(params, scaling)
        adapters, (x, y) = of.init(jax.random.key(outcome.trial.seed)), Data(outcome.trial.seed)[0]
        grads = jax.grad(lambda ab, of=of, x=x, y=y: jnp.mean((of.apply(params, ab, x) - y) ** 2))(adapters)
        norms = [np.linalg.norm(layer) for ab in grads.values() for leaf in ab.values() for layer in leaf]
        assert len(norms) == 2 * 2 * LAYERS
        assert outcome.factor_norms[0] == pytest.approx(np.mean(norms), rel=1e-5)


def lowered(trials, rows=2, width=256):
    """The step of so many trials, with adapters on a base of two stacks of square weights; the bytes of that base."""
    base = {name: jax.ShapeDtypeStruct((4, width, width), "float32") for name in ("up", "down")}
    x = jax.ShapeDtypeStruct((rows, width), "float32")
    lora = rslora.wrap(layers, base, x, config=rslora.LoraConfig(rank=2, alpha=3, targets=["*"]))
    ts = [Trial(1e-2, scaling=s) for s in ("rslora", "lora")] * (trials // 2)
    rates = jnp.ones(trials)
    state = jax.eval_shape(lambda: starting_states(lora, ts, optax.adam, rates))
    batch = jax.ShapeDtypeStruct((trials, rows, width), "float32")
    step = make_sweep_step(lora, squares, optax.adam)
    return step.lower(state, rates, scaling_factors(lora, ts), base, (batch, batch)), 2 * 4 * width * width * 4


def test_the_base_is_there_once_however_many_trials():
    (two, base), (eight, _) = lowered(2), lowered(8)
    few, many = (program.compile().memory_analysis() for program in (two, eight))
    assert many.argument_size_in_bytes < base + 8 * (few.argument_size_in_bytes - base)
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < 6 * 0.1 * base


def test_the_base_meets_the_rows_of_all_trials_in_one_product():
    program, _ = lowered(8, rows=3)
    # Both weights share one function of a value and its data's gradient; all else is batched over the trials.
    products = [line for line in program.as_text().splitlines() if "dot_general" in line]
    with_base = [line for line in products if "(tensor<8x3x256xf32>, tensor<256x256xf32>)" in line]
    assert len(with_base) == 2 and not any("batching_dims" in line for line in with_base)
    assert len(products) == 2 + 6


def test_a_second_sweep_compiles_nothing(params):
    lora = wrapped(params)

    def go(rate, seed):
        return sweep(
            lora,
            params,
            [Trial(rate, seed)] * 2,
            batches=Data,
            loss=squares,
            optimizer=optax.sgd,
            steps=1,
            heldout=[Data(5)[0]],
        )

    go(1e-2, 0)
    step, evaluate = make_sweep_step(lora, squares, optax.sgd), make_sweep_evaluate(lora, squares)
    go(1e-1, 3)
    assert (step._cache_size(), evaluate._cache_size()) == (1, 1)


def test_what_cannot_be_swept_is_refused(params):
    def go(trials, **options):
        return sweep(
            wrapped(params),
            params,
            trials,
            **{"batches": Data, "loss": squares, "optimizer": optax.sgd, "steps": 2} | options,
        )

    with pytest.raises(ValueError, match="learning rate -1"):
        Trial(-1)
    with pytest.raises(ValueError, match="sweep of 0 trials"):
        go([])
    with pytest.raises(ValueError, match="evaluate_at has 3"):
        go([Trial(1e-2)], evaluate_at=(0, 3))
    with pytest.raises(ValueError, match="scaling='half' is not known"):
        go([Trial(1e-2, scaling="half")])
    with pytest.raises(ValueError, match="no token with loss"):
        mean_loss(np.zeros((2, 2)))


def test_stacking_keeps_the_trees():
    assert stack([{"a": np.ones(2)}, {"a": np.zeros(2)}])["a"].tolist() == [[1, 1], [0, 0]]
