"""Attention in chunks is attention: values and gradients as by hand in float64, and no array of all scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax.models.attention import attend
from rslora_jax.models.chunked import chunked
from rslora_jax.models.decoder import Decoder, DecoderConfig, init_cache
from rslora_jax.models.places import Places

pytestmark = pytest.mark.by_day_on("oldest")


@st.composite
def cases(draw):
    """Rows of padding before, of documents side by side or cut short; and what attention adds to them."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    heads, groups, size = draw(st.sampled_from([(1, 1, 4), (2, 3, 6), (1, 4, 2)]))
    lengths = [draw(st.lists(st.integers(1, 15), min_size=1, max_size=6)) for _ in range(batch)]
    positions, segments = np.full((2, batch, tokens), -1)
    for row, of in enumerate(lengths):
        start = draw(st.integers(0, 5))
        for n, length in enumerate(of):
            stop = min(start + length, tokens)
            positions[row, start:stop], segments[row, start:stop] = np.arange(max(stop - start, 0)), n
            start = stop
    is_packed = draw(st.booleans())
    if not is_packed:
        positions = np.arange(tokens) - np.array([draw(st.integers(0, 5)) for _ in range(batch)])[:, None]
    window = draw(st.none() | st.integers(1, 12))
    cap = draw(st.sampled_from([None, 3.0]))
    chunk = draw(st.sampled_from([1, 4, 16, 64]))
    return (batch, tokens, heads, groups, size), positions, segments if is_packed else None, window, cap, chunk


def by_hand(q, k, v, positions, segments, window, scale, cap):
    """Return attention of (B, T, K, G, H) queries in float64, row by row and query by query."""
    out = np.zeros(q.shape)
    for b, t, head, group in np.ndindex(q.shape[:-1]):
        keys = [
            s
            for s in range(k.shape[1])
            if 0 <= positions[b, s] <= positions[b, t]
            and (segments is None or segments[b, s] == segments[b, t])
            and (window is None or positions[b, s] > positions[b, t] - window)
        ]
        if keys:
            scores = k[b, keys, head] @ q[b, t, head, group] * scale
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[b, t, head, group] = weights @ v[b, keys, head] / weights.sum()
    return out


def arrays(shape, seed=0):
    batch, tokens, heads, groups, size = shape
    rng = np.random.default_rng(seed)
    shapes = (batch, tokens, heads, groups, size), (batch, tokens, heads, size), (batch, tokens, heads, size)
    return [rng.normal(size=of).astype(np.float32) for of in shapes]


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.nightly)])
def test_values_are_those_by_hand(examples):
    settings(max_examples=examples, deadline=None, derandomize=True)(given(cases())(check_by_hand))()


def check_by_hand(case):
    shape, positions, segments, window, cap, chunk = case
    q, k, v = arrays(shape)
    at = Places(jnp.asarray(positions), None if segments is None else jnp.asarray(segments))
    wide = [a.astype(np.float64) for a in (q, k, v)]
    want = by_hand(*wide, positions, segments, window, 0.7, cap)
    limit = None if window is None else jnp.int32(window)
    got = chunked(q, k, v, at, at, limit, 0.7, cap, chunk)
    whole = attend(
        jnp.asarray(q).reshape(*q.shape[:2], -1, q.shape[-1]),
        at,
        [(jnp.asarray(k), jnp.asarray(v), at)],
        window,
        size=0.7**-2,
        cap=cap,
        how="xla",
    )
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(whole.reshape(got.shape), want, atol=2e-6)


def gradients(how, q, k, v, at, window, cap, seed=1):
    B, T, K, G, H = q.shape
    dout = np.random.default_rng(seed).normal(size=(B, T, K * G, H)).astype(np.float32)

    def of(q, k, v):
        out = attend(q.reshape(B, T, K * G, H), at, [(k, v, at)], window, cap=cap, how=how)
        return jnp.sum(out * dout)

    return jax.jit(jax.grad(of, (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("kind", ["causal", "padded", "packed", "packed long", "window", "packed window"])
def test_gradients_are_those_of_all_scores(kind, cap):
    q, k, v = (jnp.asarray(a) for a in arrays((2, 300, 2, 3, 8)))
    positions, segments = np.tile(np.arange(300), (2, 1)), None
    if "packed" in kind:
        length = 270 if "long" in kind else 77  # with chunks of one document alone, or of several
        segments, positions = positions // length, positions % length
    if kind == "padded":
        positions = positions - [[200], [3]]
    at = Places(jnp.asarray(positions), None if segments is None else jnp.asarray(segments))
    window = 50 if "window" in kind else None
    got, want = (gradients(how, q, k, v, at, window, cap) for how in ("chunked", "xla"))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()) + 2e-6)


def test_in_bfloat16_it_is_as_near_as_all_scores_are():
    q, k, v = (jnp.asarray(a) for a in arrays((1, 300, 1, 2, 16)))
    at = Places(jnp.arange(300)[None])
    exact = gradients("xla", q, k, v, at, None, None)
    rounded = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    for got, want in zip(gradients("chunked", *rounded, at, None, None), exact, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03 * float(jnp.abs(want).max()))


def tiny(**more):
    sizes = dict(vocab_size=32, width=24, mlp_width=32, num_layers=2, num_heads=6, num_kv_heads=2, max_len=4096)
    return DecoderConfig(**{**sizes, **more})


WINDOWS = {"window": 100, "window_layers": (True, False), "score_cap": 5.0}


@pytest.mark.parametrize(
    ("more", "scan_layers"),
    [(WINDOWS, True), *(pytest.param(*of, marks=pytest.mark.nightly) for of in ((WINDOWS, False), ({}, True)))],
)
def test_a_decoder_gives_the_same_in_either_form_and_when_it_is_fed_through_a_cache(more, scan_layers):
    models = [Decoder(tiny(scan_layers=scan_layers, attention=how, **more)) for how in ("xla", "chunked")]
    tokens = jax.random.randint(jax.random.key(0), (2, 300), 0, 32)
    variables = models[0].init(jax.random.key(1), tokens)
    whole, some = (jax.jit(model.apply)(variables, tokens) for model in models)
    np.testing.assert_allclose(some, whole, atol=1e-5)
    cache = init_cache(models[1].config, 2, 300)
    parts = []
    for start, stop in ((0, 299), (299, 300)):
        logits, cache = models[1].apply(variables, tokens[:, start:stop], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


MORE_POLICIES = ("dots_with_no_batch_dims_saveable", "everything_saveable")


@functools.cache
def temporary(tokens, remat="full"):
    config = tiny(attention="auto", scan_layers=True, remat=remat, max_len=1 << 15)
    model, ids = Decoder(config), jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    step = jax.jit(jax.grad(lambda variables, ids: model.apply(variables, ids, method="hidden").sum()))
    return step.lower(variables, ids).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "remat",
    ["none", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("full", "dots_saveable", *MORE_POLICIES))],
)
def test_memory_grows_with_the_tokens(remat):
    sizes = [temporary(tokens, remat) for tokens in (2048, 4096, 8192)]
    exponent = np.log2(sizes[2] / sizes[1]), np.log2(sizes[1] / sizes[0])
    assert max(exponent) < 1.1, (sizes, exponent)
    assert sizes[2] < 6 * 8192 * 8192  # the scores of one head of six are four times that
