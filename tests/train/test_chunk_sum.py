"""Losses in chunks: the value and the gradients of the whole, and never more than a chunk's logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.analysis.stability import measure
from rslora_jax.chunk_sum import chunk_sum
from rslora_jax.models.decoder import Decoder
from rslora_jax.train.batches import Batch
from rslora_jax.train.loss import token_losses

from ..reference import assert_near, trained
from .tiny import CONFIG

pytestmark = pytest.mark.usefixtures("compile_fast")


def whole(x_CxTxD, targets_CxT, mask_CxT, w_DxV, bias_V, cap):
    """Give the summed loss by optax, from all logits."""
    logits = x_CxTxD @ w_DxV + bias_V
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    return jnp.sum(mask_CxT * optax.softmax_cross_entropy_with_integer_labels(logits, targets_CxT))


def in_chunks(x_CxTxD, targets_CxT, mask_CxT, w_DxV, bias_V, cap):
    return chunk_sum(lambda *chunk: whole(*chunk, w_DxV, bias_V, cap), x_CxTxD, targets_CxT, mask_CxT)


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_value_and_gradients_are_those_of_the_whole(data):
    chunks, tokens, width, vocabulary = (data.draw(st.integers(*ends)) for ends in ((1, 4), (1, 5), (1, 6), (2, 9)))
    by = data.draw(st.sets(st.sampled_from([0, 3, 4]), min_size=1).map(sorted).map(tuple))
    cap, times = data.draw(st.sampled_from([None, 3.0])), data.draw(st.sampled_from([1.0, -0.3]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    numbers = [rng.standard_normal(size).astype(np.float32) for size in ((chunks, tokens, width), (width, vocabulary))]
    targets = rng.integers(0, vocabulary, (chunks, tokens))
    mask = rng.integers(0, 2, (chunks, tokens)).astype(np.float32)
    arguments = [numbers[0], targets, mask, numbers[1], rng.standard_normal(vocabulary).astype(np.float32)]
    found, wanted = (
        jax.jit(jax.value_and_grad(lambda *of, sum_of=sum_of: times * sum_of(*of, cap), by))(*arguments)
        for sum_of in (in_chunks, whole)
    )
    assert_near(found, wanted, 2e-6, floor=0.1)


def test_what_is_closed_over_may_be_vectorised_drawn_from_and_differentiated_twice():
    x_CxN, keys = jnp.linspace(-1, 1, 12).reshape(3, 4), jax.random.split(jax.random.key(0), 2)

    def total(sum_of, w, key):
        return sum_of(lambda x: jnp.sum(jnp.sin(w * x) * jax.random.bernoulli(key, 0.5, x.shape)), x_CxN)

    def plain(value, x_CxN):
        return sum(value(x) for x in x_CxN)

    def both(sum_of):
        first = jax.grad(functools.partial(total, sum_of))
        return jax.vmap(first)(jnp.array([0.5, 2.0]), keys), jax.vmap(jax.grad(first))(jnp.array([0.5, 2.0]), keys)

    assert_near(both(chunk_sum), both(plain), 1e-6)


def batch_of(rows, length, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length), np.int32)
    mask = rng.integers(0, 2, (rows, length)).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(tokens, np.roll(tokens, -1, 1), mask, positions, np.ones_like(tokens))


@pytest.mark.parametrize("config", [pytest.param({}, marks=pytest.mark.nightly), {"tie_head": True, "logit_cap": 2.0}])
def test_adapters_of_head_and_table_get_the_gradients_of_all_logits(config):
    model, batch = Decoder(dataclasses.replace(CONFIG, **config)), batch_of(2, 11, CONFIG.vocab_size)
    params = model.init(jax.random.key(0), batch.tokens_BxT)
    targets = ("*/kernel", "*embedding")
    lora = rslora.wrap(
        model.apply, params, batch.tokens_BxT, config=rslora.LoraConfig(rank=3, alpha=7, targets=targets)
    )

    def mean(adapters, loss):
        total, count = loss(functools.partial(lora.apply, params, adapters), batch)
        return total / count

    def of_all_logits(run, batch):
        logits = run(batch.tokens_BxT, batch.positions_BxT, batch.segment_ids_BxT)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_BxT)
        return jnp.sum(losses * batch.loss_mask_BxT), batch.loss_mask_BxT.sum()

    adapters = trained(lora)
    gradient = jax.jit(jax.value_and_grad(mean), static_argnums=1)
    wanted = gradient(adapters, of_all_logits)
    for loss in (train.token_loss(11, chunk=4), train.token_loss(9, chunk=4)):
        assert_near(gradient(adapters, loss), wanted, 5e-6)


def test_what_is_read_as_a_gradient_of_a_head_is_that_of_all_logits():
    """Moments of its gradients are not linear in what a sum is multiplied by, and EVA's data do not depend on it."""
    config = dataclasses.replace(CONFIG, num_layers=1, tie_head=False)
    model, batches = Decoder(config), [batch_of(2, 12, config.vocab_size, seed) for seed in (0, 1)]
    params = model.init(jax.random.key(0), batches[0].tokens_BxT)
    head = rslora.LoraConfig(rank=3, alpha=7, targets="*lm_head*")
    lora = rslora.wrap(model.apply, params, batches[0].tokens_BxT, config=head)

    def read(chunk):
        def mean(run, batch):
            total, count = train.token_loss(12, chunk=chunk)(run, batch)
            return total / count**2  # so that batches differ in what it is multiplied by

        eva = rslora.starts.eva(lora, params, jax.random.key(2), batches, loss=mean)[1]
        return measure(lora, mean, params, trained(lora), batches[0]), jax.tree.map(jnp.abs, eva)

    assert_near(read(5), read(12), 1e-4)


def test_a_step_holds_one_chunks_logits_and_nothing_of_a_frozen_heads_size():
    width, vocabulary, length, chunk = 256, 16384, 1024, 64
    x_1xTxD, head_DxV = jnp.ones((1, length, width)), jnp.ones((width, vocabulary))
    batch = batch_of(1, length, vocabulary)

    def loss(scale, head_DxV, x_1xTxD, chunk):
        def run(*args, method):
            return scale * x_1xTxD if method == "hidden" else args[0] @ head_DxV

        return train.token_loss(length, chunk=chunk)(run, batch)[0]

    def temporaries(chunk):
        step = jax.jit(jax.value_and_grad(loss), static_argnums=3)
        return step.lower(jnp.ones(width), head_DxV, x_1xTxD, chunk).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * chunk * vocabulary
    assert temporaries(chunk) < 2.5 * logits + 4 * x_1xTxD.nbytes
    assert temporaries(length) > 16 * logits  # of all: what is compared is there


def test_logits_are_formed_once():
    model, batch = Decoder(CONFIG), batch_of(2, 12, CONFIG.vocab_size)
    params = jax.eval_shape(model.init, jax.random.key(0), batch.tokens_BxT)
    lora = rslora.wrap(model.apply, params, batch.tokens_BxT, config=rslora.LoraConfig(rank=3, alpha=7))
    adapters = jax.eval_shape(lora.init, jax.random.key(0))
    counts = [train.step_flops(lora, train.token_loss(12, chunk=n), params, adapters, batch) for n in (12, 4)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("places", [128, 129, 300])
def test_the_losses_of_single_tokens_are_those_of_all_logits(places):
    rng = np.random.default_rng(places)
    x_BxPxD, head_DxV = rng.standard_normal((5, places, 4)), rng.standard_normal((4, 7))
    targets = rng.integers(0, 7, (5, places))
    found = token_losses(lambda x: x @ head_DxV, jnp.asarray(x_BxPxD), jnp.asarray(targets))
    logits = x_BxPxD @ head_DxV
    wanted = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, wanted, atol=2e-6)
