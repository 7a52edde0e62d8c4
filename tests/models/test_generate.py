"""Generation against the plainest way to do it: the whole forward again for every token."""

import jax
import jax.numpy as jnp
import pytest

from rslora_jax.models.generate import _loop, generate
from rslora_jax.models.layout import stack_layers
from rslora_jax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=97,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_len=64,
    tie_head=False,
)
MODEL = Llama(CONFIG)
WHOLE = jax.jit(MODEL.apply)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [90, 2, 90], list(range(20, 33))]


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))


def _plain(variables, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        # What stands to the right of a token cannot change its logits, and one length compiles once.
        padded = jnp.array([ids + [0] * (32 - len(ids))])
        ids.append(int(WHOLE(variables, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_greedy_batch_equals_the_whole_forward_one_prompt_at_a_time(variables):
    outs = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=6, bucket=8)
    assert outs == [_plain(variables, prompt, 6) for prompt in PROMPTS]
    alone = [generate(MODEL.apply, variables, [p], CONFIG, max_new=6, bucket=8)[0] for p in PROMPTS]
    assert outs == alone


def test_the_bucket_and_the_layout_do_not_matter(variables):
    want = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=4, bucket=1)
    assert generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=4, bucket=32) == want
    scanned = LlamaConfig(**{**vars(CONFIG), "scan_layers": True})
    assert generate(Llama(scanned).apply, stack_layers(variables), PROMPTS, scanned, max_new=4) == want


def test_rows_end_with_the_end_token_each_in_its_own_time(variables):
    free = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=8, bucket=8)
    eos_id = free[0][2]
    ended = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=8, bucket=8, eos_id=eos_id)
    for long, short in zip(free, ended, strict=True):
        stop = long.index(eos_id) + 1 if eos_id in long else 8
        assert short == long[:stop]
    assert len(ended[0]) <= 3 and ended[0][-1] == eos_id


def test_sampling_follows_the_key_and_not_the_batch(variables):
    def draw(prompts, seed, **options):
        key = jax.random.key(seed)
        return generate(
            MODEL.apply, variables, prompts, CONFIG, max_new=6, bucket=16, temperature=2.0, key=key, **options
        )

    batch = draw(PROMPTS, 0)
    assert batch == draw(PROMPTS, 0) != draw(PROMPTS, 1)
    assert batch[0] == draw(PROMPTS[:1], 0)[0]
    greedy = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=6, bucket=16)
    assert draw(PROMPTS, 0, top_p=1e-6) == greedy != batch


def test_other_prompts_weights_and_temperatures_share_one_program(variables):
    traces = []

    def apply(both, *args, **kwargs):
        traces.append(1)
        base, shift = both
        logits, cache = MODEL.apply(base, *args, **kwargs)
        return logits + shift, cache

    def run(shift, prompts, **options):
        return generate(apply, (variables, shift), prompts, CONFIG, max_new=3, bucket=16, **options)

    first = run(jnp.zeros(97), PROMPTS)
    seen = len(traces)
    assert run(jnp.zeros(97).at[42].set(1e6), [[1], [2], [3], [4, 5]]) == [[42] * 3] * 4 != first
    assert len(traces) == seen
    run(jnp.zeros(97), PROMPTS, temperature=1.0, key=jax.random.key(0))
    seen = len(traces)
    run(jnp.zeros(97), PROMPTS, temperature=0.5, key=jax.random.key(7))
    assert len(traces) == seen


def test_the_prompt_is_read_without_a_product_with_the_vocabulary(variables):
    P = 16
    args = (
        MODEL.apply,
        variables,
        jnp.zeros((2, P), jnp.int32),
        jnp.zeros((2, P), jnp.int32),
        *(jnp.int32(-1), jnp.float32(0), jnp.float32(1), None),
    )
    program = _loop.lower(*args, config=CONFIG, max_new=3, nucleus=False).compile().as_text()
    assert "f32[2,1,97]" in program or "f32[2,97]" in program
    assert f"f32[2,{P - 1},97]" not in program and f"f32[{2 * (P - 1)},97]" not in program


def test_mistakes_are_named(variables):
    def run(prompts=PROMPTS, max_new=4, **options):
        generate(MODEL.apply, variables, prompts, CONFIG, max_new=max_new, **options)

    for options, message in (
        ({"prompts": []}, "empty"),
        ({"prompts": [[1], []]}, "empty"),
        ({"max_new": 0}, "at least one token"),
        ({"temperature": -1.0}, "at least 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 1.0}, "needs a key"),
        ({"max_new": 53}, "exceed max_len=64"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    assert len(generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=52)[3]) == 52
