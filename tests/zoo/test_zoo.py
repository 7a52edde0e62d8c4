"""Models that others wrote: every weight is found, and the laws hold with an adapter on each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.config import matches
from tests.reference import assert_near, gradients_by_hand, merged_by_hand
from tests.zoo import linen_layers, nnx_layers, pretrained
from tests.zoo.model import Model
from tests.zoo.pretrained import MAX

pytestmark = pytest.mark.usefixtures("compile_fast")

RANK, ALPHA = 3, 2.0  # alpha is not the rank, and the rank is no square

MODELS = pretrained.MODELS | linen_layers.MODELS | nnx_layers.MODELS
DECODERS = [*pretrained.DECODERS, *pretrained.ENCODER_DECODERS]

# Normed by their own norm before their product, which has no low-rank form: exact, materialised, and said.
NORMED = {"linen WeightNorm": {"*/kernel"}, "Wav2Vec2": {"*/weight_v"}}


@functools.cache
def model(name: str) -> Model:
    return MODELS[name]()


def wrapped(it, fn, *args, **config):
    return rslora.wrap(fn, it.params, *args, config=rslora.LoraConfig(rank=RANK, alpha=ALPHA, **config))


# Compiling every model and its gradient takes minutes: the rest of them runs at night, on both ends of the JAX range.
BY_DAY = {"GPT-2", "ALBERT", "ViT", "linen OptimizedLSTMCell", "linen ragged_dot", "nnx scan, remat"}


def cases(names=MODELS, by_day=BY_DAY):
    def marks(name):
        yield pytest.mark.xdist_group(name)  # all tests of a model are in one process
        if name not in by_day:
            yield pytest.mark.nightly

    return pytest.mark.parametrize("name", [pytest.param(name, marks=[*marks(name)]) for name in names])


@cases(by_day=MODELS)
@pytest.mark.filterwarnings("error::rslora_jax.RsloraWarning")
def test_every_weight_is_found_with_its_axes_and_nothing_falls_back(name):
    it = model(name)
    if name in NORMED:
        with pytest.warns(rslora.RsloraWarning, match="1 of .* materialised"):
            lora = wrapped(it, it.fn, *it.args, targets=["*"], allow_large_rank=True)
    else:
        lora = wrapped(it, it.fn, *it.args, targets=["*"])
    assert axes_of(lora) == it.weights()
    loud = {path for path, site in lora.sites.items() if site.fallbacks}
    assert all(any(matches(path, p) for p in NORMED.get(name, ())) for path in loud)
    if it.head:
        tables = {path for path, site in lora.sites.items() if site.kind == "embedding"}
        assert set(wrapped(it, it.fn, *it.args).sites) == {p for p in lora.sites if not matches(p, it.head)} - tables


def axes_of(lora):
    return {path: (site.in_axes, site.out_axes) for path, site in lora.sites.items()}


def adapters_of(lora):
    """Return adapters as at the start and as if trained, from numpy: op by op, JAX compiles for every shape."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lora.init, jax.random.key(0))

    def draw(shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape.shape), shape.dtype)

    adapters = jax.tree.map(draw, shapes)
    return {path: f | {"b": jnp.zeros_like(f["b"])} for path, f in adapters.items()}, adapters


def loss(outputs):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating))


def with_gradient(fn, argument):
    """Compile a function and its gradient at once: compiling is what takes the time here."""

    def value(*args):
        outputs = fn(*args)
        return loss(outputs), outputs

    return jax.jit(jax.grad(value, argument, has_aux=True, allow_int=True))


@cases()
@pytest.mark.by_day_on("oldest")
@pytest.mark.filterwarnings("ignore::rslora_jax.RsloraWarning")
def test_applied_is_merged_and_so_are_the_gradients(name):
    it = model(name)
    lora = wrapped(it, it.fn, *it.args, targets=["*"])
    applied, by_hand = with_gradient(lora.apply, 1), with_gradient(it.fn, 0)
    fresh, adapters = adapters_of(lora)

    _, plain = by_hand(it.params, *it.args)
    assert_near(applied(it.params, fresh, *it.args)[1], plain, 1e-6)

    dw, want = by_hand(merged_by_hand(lora, it.params, adapters), *it.args)
    gradients, got = applied(it.params, adapters, *it.args)
    assert_near(got, want, it.tolerance)
    assert_near(gradients, gradients_by_hand(lora, adapters, dw), 1e-4, floor=1e-3)
    assert np.abs(jax.tree.leaves(want)[0] - jax.tree.leaves(plain)[0]).max() > 0.01


@cases(DECODERS)
@pytest.mark.by_day_on("oldest")
def test_a_token_from_the_cache_is_that_of_the_merged_weights(name):
    """The weights found in decoding are those found in training, so what one has trained serves the other."""
    it = model(name)
    lora = wrapped(it, it.decode, *it.args, targets=["*"])
    assert axes_of(lora) == axes_of(wrapped(it, it.fn, *it.args, targets=["*"]))
    assert not any(site.fallbacks for site in lora.sites.values())
    _, adapters = adapters_of(lora)
    want = jax.jit(it.decode)(merged_by_hand(lora, it.params, adapters), *it.args)
    assert_near(jax.jit(lora.apply)(it.params, adapters, *it.args), want, it.tolerance)


@cases(["Llama", "T5"], by_day={})
def test_greedy_decoding_gives_the_tokens_of_the_merged_weights(name):
    """One wrapped step serves the prompt and every token after it."""
    it = model(name)
    *context, prompt = it.args
    cache, state = it.start(it.params, *context)
    lora = wrapped(it, it.step, prompt, cache, 0, state, targets=["*"])
    _, adapters = adapters_of(lora)
    merged = merged_by_hand(lora, it.params, adapters)

    def generate(step, cache):
        tokens, at, written, seen = prompt, 0, [], []
        while at < MAX:
            logits, cache = step(tokens, cache, at)
            at += tokens.shape[1]
            tokens = np.argmax(logits[:, -1:], -1).astype(np.int32)
            written.append(tokens)
            seen.append(logits)
        return np.concatenate(written, 1), np.concatenate(seen, 1)

    applied, by_hand = jax.jit(lora.apply), jax.jit(it.step)
    got, got_logits = generate(lambda *args: applied(it.params, adapters, *args, state), cache)
    want, want_logits = generate(lambda *args: by_hand(merged, *args, state), cache)
    np.testing.assert_array_equal(got, want)
    assert_near(got_logits, want_logits, it.tolerance)
    plain, _ = generate(lambda *args: by_hand(it.params, *args, state), cache)
    assert (plain != want).any()
