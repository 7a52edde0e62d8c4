"""Runs together beside the same runs alone, by `make_step`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.models.llama import Llama
from rslora_jax.train.sweep import Trial, make_sweep_step, scaling_factors, stack, start, sweep
from tests.train.tiny import CONFIG, Run

pytestmark = pytest.mark.xdist_group("fit")

TRIALS = [
    Trial(3e-3),
    Trial(1e-2, seed=1, scaling="lora"),
    Trial(2e-2, seed=2, scaling=lambda rank: rank**-0.25),
    Trial(1e-2, seed=1),
]
STEPS = 4


def adamw(rate):
    return train.make_optimizer("adamw", schedule=rate, options={"weight_decay": 0.1})


def warmed_sgd(rate):
    shape = train.make_schedule("linear", peak=1.0, steps=STEPS, warmup=0.5)
    return train.make_optimizer("sgd", schedule=lambda step: rate * shape(step), options={"momentum": 0.9})


def adafactor(rate):
    return train.make_optimizer("adafactor", schedule=rate)


@functools.cache
def made(scan=True):
    """A model with ranks and alphas that differ between weights."""
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    run = Run()
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return run, Llama(config), params


def wrapped(model, params, scaling="rslora"):
    config = rslora.LoraConfig(
        rank=3, alpha=7, scaling=scaling, rank_pattern={"*/v_proj/*": 5}, alpha_pattern={"*/up_proj/*": 2}
    )
    return rslora.wrap(model.apply, params, jnp.zeros((1, 4), jnp.int32), config=config)


def alone(run, model, params, trial, optimizer):
    """The trial by itself: its own Lora, step and evaluation."""
    lora = wrapped(model, params, trial.scaling or "rslora")
    made = optimizer(trial.learning_rate)
    step, state = train.make_step(lora, run.loss, made), train.TrainState.create(lora.init(jax.random.key(trial.seed)), made)
    data, seen = train.train_batches(run.rows, batch_size=3, seed=trial.seed), []
    for n in range(STEPS):
        state, metrics = step(state, params, data[n])
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    evaluate = train.make_evaluate(lora, run.loss)
    sums = [evaluate(params, state.adapters, batch) for batch in train.heldout_batches(run.held, batch_size=4)]
    return np.array(seen).T, float(sum(s for s, _ in sums) / sum(c for _, c in sums)), state.adapters


@pytest.mark.parametrize("optimizer", [adamw, warmed_sgd, adafactor])
def test_runs_together_are_the_runs_alone(optimizer):
    run, model, params = made()
    found = sweep(
        wrapped(model, params),
        params,
        TRIALS,
        batches=lambda seed: train.train_batches(run.rows, batch_size=3, seed=seed),
        loss=run.loss,
        optimizer=optimizer,
        steps=STEPS,
        heldout=train.heldout_batches(run.held, batch_size=4),
    )
    assert [outcome.trial for outcome in found] == TRIALS
    for outcome in found:
        (losses, norms), heldout, adapters = alone(run, model, params, outcome.trial, optimizer)
        np.testing.assert_allclose(outcome.losses, losses, rtol=1e-5)
        np.testing.assert_allclose(outcome.grad_norms, norms, rtol=1e-4)
        assert outcome.heldout[STEPS].loss == pytest.approx(heldout, rel=1e-5)
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max()),
            outcome.adapters,
            adapters,
        )
        assert outcome.diverged is None
    assert len({outcome.heldout[STEPS].loss for outcome in found}) == len(TRIALS)
