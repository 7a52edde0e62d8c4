"""The output head is found by its place in the program, whatever it is called."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import rslora_jax as rslora
from tests.program_models import normal

VOCAB, WIDTH = 50, 12
PARAMS = {
    "table": normal(0, VOCAB, WIDTH),
    "w": normal(1, WIDTH, WIDTH),
    "stack": normal(2, 3, WIDTH, WIDTH),
    "out": normal(3, WIDTH, VOCAB),
    "bias": jnp.ones(VOCAB),
}
TOKENS = jnp.array([[1, 2, 3]])


def body(p, tokens):
    x = p["table"][tokens]
    x = x + jnp.tanh(x @ p["w"])
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])[0]


def logits(p, tokens):
    return body(p, tokens) @ p["out"]


def with_bias(p, tokens):
    return logits(p, tokens) + p["bias"]


def soft_capped(p, tokens):
    return 30 * jnp.tanh(logits(p, tokens) / 30)


def in_jit_and_remat(p, tokens):
    return jax.jit(jax.checkpoint(lambda x, w: x @ w))(body(p, tokens), p["out"])


def loss(p, tokens):
    """A function that ends in a loss has the head inside it."""
    logp = jax.nn.log_softmax(logits(p, tokens)[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()


def beside_another_output(p, tokens):
    x = body(p, tokens)
    return {"logits": x @ p["out"], "hidden": x}


def chunked(p, tokens):
    return lax.map(lambda x: x @ p["out"], body(p, tokens))


@pytest.mark.parametrize("fn", [logits, with_bias, soft_capped, in_jit_and_remat, loss, beside_another_output, chunked])
def test_the_head_is_left_out_of_all_linear_and_taken_by_name(fn):
    def found(**fields):
        return set(rslora.wrap(fn, PARAMS, TOKENS, config=rslora.LoraConfig(rank=3, alpha=7, **fields)).sites)

    assert found() == {"w", "stack"}
    assert found(targets=["all-linear", "out"]) == {"w", "stack", "out"}
    assert found(targets=["table"]) == {"table"}


def test_a_tied_head_is_the_embedding():
    lora = rslora.wrap(
        lambda p, t: body(p, t) @ p["table"].T, PARAMS, TOKENS, config=rslora.LoraConfig(rank=3, alpha=7, targets="*")
    )
    assert set(lora.sites) == {"table", "w", "stack"}
    assert lora.sites["table"].kind == "embedding" and lora.sites["table"].in_axes == (0,)


def test_the_last_layer_of_a_model_without_tokens_is_no_head():
    def mlp(p, x):
        return jnp.tanh(x @ p["w"]) @ p["out"]

    lora = rslora.wrap(mlp, PARAMS, jnp.ones((2, WIDTH)), config=rslora.LoraConfig(rank=3, alpha=7))
    assert set(lora.sites) == {"w", "out"}
