"""What is compiled of a run goes with its `Lora`: a process that trains many grows by none of them."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.train.state import make_evaluate, make_step
from rslora_jax.train.sweep import make_sweep_step


def matrix():
    return rslora.wrap(
        lambda p, x: x @ p, jnp.ones((4, 4)), jnp.ones((2, 4)), config=rslora.LoraConfig(rank=3, alpha=7)
    )


def squares(run, batch):
    return jnp.sum(run(batch) ** 2), jnp.float32(batch.size)


def trained(lora, folder):
    batches = [np.ones((2, 4), np.float32)] * 3
    adapters = lora.init(jax.random.key(0))
    options = {"batches": batches, "heldout": batches[:1], "loss": squares, "optimizer": optax.adam(1e-2)}
    return train.fit(lora, jnp.ones((4, 4)), adapters, steps=3, folder=folder, show=False, **options)


def test_nothing_of_a_run_stays_when_its_lora_goes(tmp_path):
    lora = matrix()
    trained(lora, tmp_path / "run")
    assert lora.compiled
    gone = weakref.ref(lora)
    del lora
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", [make_step, make_evaluate, make_sweep_step])
def test_what_is_made_again_is_the_same_and_only_the_last_few_are_kept(make):
    lora, optimizers = matrix(), [optax.sgd(0.1 * n) for n in range(9)]
    losses = [lambda run, batch, n=n: (jnp.sum(run(batch)) * n, jnp.float32(1)) for n in range(9)]
    more = [(optimizer,) if make is not make_evaluate else () for optimizer in optimizers]
    made = [make(lora, loss, *its) for loss, its in zip(losses, more, strict=True)]
    assert make(lora, losses[-1], *more[-1]) is made[-1]
    first = weakref.ref(losses[0])
    del made, losses[0]
    gc.collect()
    assert first() is None
