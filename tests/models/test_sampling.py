"""How a token is chosen: by hand in numpy, and on the way through generation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax.models.generation import generate
from rslora_jax.models.sampling import changed, choosing

from .test_generation import CONFIG, MODEL, PROMPTS, WHOLE, variables  # noqa: F401

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
HOW = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 7, 12, 99]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
    },
)


def by_hand(logits, seen, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Change logits one token at a time, in float64."""
    out = np.array(logits, np.float64)
    for token in np.flatnonzero(seen):
        out[token] = out[token] / repetition_penalty if out[token] > 0 else out[token] * repetition_penalty
    if not temperature:
        return out
    out /= temperature
    order = sorted(range(len(out)), key=lambda token: -out[token])
    may_be = order[:top_k] if top_k else order
    weight = {token: np.exp(out[token] - out[order[0]]) for token in may_be}
    whole, before, kept = sum(weight.values()), 0.0, []
    for token in may_be:
        if top_p == 1 or before / whole < top_p:
            kept.append(token)
        before += weight[token]
    kept = [token for token in kept if weight[token] >= min_p]
    return np.array([x if token in kept else -np.inf for token, x in enumerate(out)])


@settings(max_examples=60, deadline=None)
@given(how=HOW, seed=st.integers(0, 999))
def test_logits_are_changed_as_by_hand(how, seed):
    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(0, 3, 12).astype(np.float32), rng.random(12) < 0.4
    got = changed(jnp.array(logits), jnp.array(seen), choosing(vocab_size=12, **how))
    np.testing.assert_allclose(got, by_hand(logits, seen, **how), rtol=1e-5)


def test_a_penalty_counts_prompt_and_answer_of_each_row(variables):  # noqa: F811
    def plain(prompt, penalty):
        ids = list(prompt)
        for _ in range(6):
            padded = jnp.array([ids + [0] * (32 - len(ids))])
            logits = np.asarray(WHOLE(variables, padded)[0, len(ids) - 1])
            ids.append(int(np.argmax(by_hand(logits, np.isin(np.arange(97), ids), repetition_penalty=penalty))))
        return ids[len(prompt) :]

    free = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=6, bucket=8)
    assert any(len(set(row)) < len(row) for row in free)  # there is something to forbid
    for penalty in (1.2, 50.0):
        got = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=6, bucket=8, repetition_penalty=penalty)
        assert got == [plain(prompt, penalty) for prompt in PROMPTS] != free


def test_what_is_drawn_is_among_what_may_be(variables):  # noqa: F811
    logits = np.asarray(WHOLE(variables, jnp.array([PROMPTS[0] + [0] * 25]))[0, len(PROMPTS[0]) - 1])
    for how in ({"top_k": 3}, {"min_p": 0.5}, {"top_p": 0.3}, {"top_k": 1}):
        may_be = np.flatnonzero(np.isfinite(by_hand(logits, [], temperature=2.0, **how)))
        drawn = set()
        for seed in range(30):
            ask = dict(max_new=1, bucket=8, temperature=2.0, key=jax.random.key(seed), **how)
            drawn.add(generate(MODEL.apply, variables, PROMPTS[:1], CONFIG, **ask)[0][0])
        assert drawn <= set(may_be.tolist()) and (len(drawn) > 1 or len(may_be) == 1), how


@pytest.mark.parametrize(
    "how",
    [{"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"repetition_penalty": float("nan")}, {"top_p": 1.1}],
)
def test_a_number_out_of_its_range_is_named(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        choosing(vocab_size=12, temperature=1.0, **how)
    with pytest.raises(ValueError, match="temperature=inf"):
        choosing(vocab_size=12, temperature=float("inf"))
