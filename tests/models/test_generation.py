"""Generation against the plainest way to do it: the whole forward again for every token."""

import jax
import jax.numpy as jnp
import pytest

from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.models.generation import generate, start, stream, tokens_of
from rslora_jax.models.layout import stack_layers
from tests.zoo.model import filled

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

CONFIG = DecoderConfig(
    vocab_size=97,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_len=64,
    tie_head=False,
)
MODEL = Decoder(CONFIG)
WHOLE = jax.jit(MODEL.apply)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [90, 2, 90], list(range(20, 33))]


@pytest.fixture(scope="module")
def variables():
    return filled(jax.eval_shape(MODEL.init, jax.random.key(3), jnp.zeros((1, 1), jnp.int32)))


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
    scanned = DecoderConfig(**{**vars(CONFIG), "scan_layers": True})
    assert generate(Decoder(scanned).apply, stack_layers(variables), PROMPTS, scanned, max_new=4) == want


def test_rows_end_with_the_end_token_each_in_its_own_time(variables):
    free = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=8, bucket=8)
    eos_id = free[0][2]
    ended = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=8, bucket=8, eos_id=eos_id)
    for long, short in zip(free, ended, strict=True):
        stop = long.index(eos_id) + 1 if eos_id in long else 8
        assert short == long[:stop]
    assert len(ended[0]) <= 3 and ended[0][-1] == eos_id
    ends = (eos_id, free[1][1])
    ended = generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=8, bucket=8, eos_id=ends)
    for long, short in zip(free, ended, strict=True):
        assert short == long[: min([n + 1 for n, token in enumerate(long) if token in ends], default=8)]
    assert len(ended[0]) <= 3 and len(ended[1]) <= 2


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
    going = start(MODEL.apply, variables, [[1] * 16, [2]], CONFIG, max_new=3, bucket=16)
    reading = going.lower()[0].compile().as_text()
    assert "f32[2,15,24]" in reading or "f32[30,24]" in reading  # the layers' own products are there
    assert not any(f"f32[{shape},97]" in reading for shape in ("2,15", "30", "2,1", "2"))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "key": jax.random.key(3), "top_p": 0.9}])
def test_a_stream_gives_the_same_tokens_by_the_same_program(variables, options):
    traces = []

    def apply(*args, **kwargs):
        traces.append(1)
        return MODEL.apply(*args, **kwargs)

    eos_id = generate(apply, variables, PROMPTS, CONFIG, max_new=11, bucket=16, **options)[0][6]
    whole = generate(apply, variables, PROMPTS, CONFIG, max_new=11, bucket=16, eos_id=eos_id, **options)
    assert len(whole[0]) <= 7 < max(map(len, whole))
    seen = len(traces)
    for chunk in (1, 3, 4, 11, 99):
        rows, sizes = [[] for _ in PROMPTS], []
        for piece in stream(
            apply, variables, PROMPTS, CONFIG, max_new=11, bucket=16, chunk=chunk, eos_id=eos_id, **options
        ):
            sizes.append(max(map(len, piece)))
            rows = [row + new for row, new in zip(rows, piece, strict=True)]
        assert rows == whole
        assert sizes[0] == 1 and max(sizes) <= chunk
    assert len(traces) == seen


def test_a_stream_stops_when_all_rows_have_ended(variables):
    eos_id = generate(MODEL.apply, variables, PROMPTS[:1], CONFIG, max_new=11, bucket=16)[0][0]
    pieces = list(stream(MODEL.apply, variables, PROMPTS[:1], CONFIG, max_new=11, bucket=16, chunk=2, eos_id=eos_id))
    assert pieces == [[[eos_id]]]


def test_compiling_ahead_leaves_nothing_to_compile(variables):
    traces, compiled = [], []

    def apply(*args, **kwargs):
        traces.append(1)
        return MODEL.apply(*args, **kwargs)

    going = start(apply, variables, PROMPTS, CONFIG, max_new=5, bucket=16)
    going.compile()
    seen = len(traces)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    state = going.advance(going.read(), 5)
    assert not compiled and len(traces) == seen
    assert tokens_of(state) == generate(MODEL.apply, variables, PROMPTS, CONFIG, max_new=5, bucket=16)
    assert compiled  # of another `apply`, so that the listener is known to listen


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
