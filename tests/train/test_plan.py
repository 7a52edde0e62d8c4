"""What a run would be: what is said before it equals what it then is, by hand and by the run itself."""

import dataclasses
import importlib
import math
import time

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.train import loop, planning
from rslora_jax.train.bytelevel import ByteTokenizer
from rslora_jax.train.encode import Encoded
from rslora_jax.train.footprint import Memory, fits, on_each, room
from rslora_jax.train.glance import decoded, histogram
from rslora_jax.train.plan_text import plan_text
from rslora_jax.train.room import MOST_ROWS, divisors, fewest_parts, largest_batch

pytestmark = pytest.mark.usefixtures("compile_fast")
TOKENS, IN, WIDE, OUT, RANK = 12, 24, 36, 20, 3
PARAMS = {"up": jnp.full((IN, WIDE), 0.1), "down": jnp.full((WIDE, OUT), 0.1), "unused": jnp.ones((7, 11))}
BATCHES = [np.full((TOKENS, IN), 0.01 * n + 0.01, np.float32) for n in range(9)]


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def squares(run, x):
    return jnp.sum(run(x) ** 2), jnp.float32(x.shape[0])


def wrapped(**config):
    return rslora.wrap(mlp, PARAMS, BATCHES[0], config=rslora.LoraConfig(rank=RANK, alpha=7, **config))


CASES = {
    "plain": ({}, {}, optax.adam(1e-3), 2),
    "in parts": ({}, {"accumulate": 3}, optax.adam(1e-3), 2),
    "skipping": ({"dropout": 0.25}, {"on_nonfinite": "skip", "accumulate": 2}, optax.sgd(1e-2), 0),
    "one moment": ({"targets": "down"}, {"dropout_key": jax.random.key(3)}, optax.lion(1e-3), 1),
}


BY_DAY = ("plain", "skipping")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in BY_DAY else pytest.mark.nightly) for c in CASES])
def test_memory_is_that_of_the_step_that_fit_compiles(case, tmp_path, monkeypatch):
    config, how, optimizer, moments = CASES[case]
    lora = wrapped(**config)
    given = {"batches": BATCHES, "loss": squares, "optimizer": optimizer, "steps": 2, "heldout": BATCHES[:1], **how}
    adapters = lora.init(jax.random.key(0))
    found = train.plan(lora, PARAMS, adapters, seconds=0, **given)
    make_step, compiled = loop.make_step, []

    def recording(*args, **options):
        step = make_step(*args, **options)

        def recorded(*of):
            compiled.append(step.lower(*of).compile())
            return step(*of)

        return recorded

    monkeypatch.setattr(loop, "make_step", recording)
    train.fit(lora, PARAMS, adapters, folder=tmp_path, show=False, **given)
    seen = compiled[0].memory_analysis()
    memory = found.memory
    results = seen.output_size_in_bytes - seen.alias_size_in_bytes
    assert memory.temporary == seen.temp_size_in_bytes + results
    unused = PARAMS["unused"].nbytes  # held, and no argument of the compiled step
    assert memory.base + memory.adapters + memory.optimizer + memory.rest >= seen.argument_size_in_bytes
    by_hand = 4 * RANK * (WIDE + OUT + (0 if "targets" in config else IN + WIDE))
    assert memory.base == 4 * (IN * WIDE + WIDE * OUT) + unused and memory.adapters == by_hand == memory.start
    assert 0 <= memory.optimizer - moments * by_hand <= 8 and memory.gradients == by_hand
    batch_and_keys = memory.held - memory.base - 2 * by_hand - memory.optimizer
    assert batch_and_keys == pytest.approx(BATCHES[0].nbytes, abs=unused + 64)
    assert memory.total == memory.held + max(memory.temporary, memory.evaluation)
    assert found.fits and found.step.seconds > 0 and found.scored.batches == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapters, PARAMS)))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_flops_are_those_by_hand_and_so_are_the_parameters(parts):
    rows = TOKENS  # so few that all products are factored
    up = 2 * rows * IN * WIDE + 2 * rows * RANK * (2 * IN + 3 * WIDE)
    down = 2 * 2 * rows * WIDE * OUT + 2 * rows * RANK * (3 * WIDE + 3 * OUT)
    lora = wrapped()
    given = {"batches": BATCHES, "loss": squares, "optimizer": optax.sgd(1e-3), "steps": 7, "seconds": 0}
    found = train.plan(lora, PARAMS, lora.init(jax.random.key(0)), accumulate=parts, **given)
    assert found.flops == up + down
    assert found.base == IN * WIDE + WIDE * OUT + 77
    assert dict(found.trained) == {"up": RANK * (IN + WIDE), "down": RANK * (WIDE + OUT)}
    assert list(found.trained.values()) == sorted(found.trained.values(), reverse=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.lists(st.integers(0, 500), min_size=400, max_size=400), st.integers(1, 2000))
def test_the_fewest_parts_that_fit_are_found_in_few_tries(rows, drops, limit):
    parts, asked = divisors(rows), []
    totals = dict(zip(parts, np.cumsum(drops[: len(parts)])[::-1].tolist(), strict=True))

    def memory(n):
        asked.append(n)
        none = dict.fromkeys(["base", "adapters", "start", "optimizer", "rest", "gradients"], 0)
        return Memory(**none, activations=totals[n])

    wanted = [n for n in parts if totals[n] <= 0.9 * limit]
    if wanted:
        assert fewest_parts(memory, parts, limit) == wanted[0]
    else:
        with pytest.raises(ValueError, match="does not fit a device"):
            fewest_parts(memory, parts, limit)
    assert len(asked) == len({*asked}) <= 2 + math.ceil(math.log2(len(parts))) if len(parts) > 1 else len(asked) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9999), st.integers(0, 9999), st.integers(1, 64), st.integers(1, 8))
def test_the_largest_batch_fits_and_one_more_does_not(fixed, slope, bend, knee, unit):
    """Memory that grows by the row, and from some size on faster, as where chunks begin."""
    limit = 3 * 10**6

    def total(rows):
        return fixed + slope * rows + bend * max(0, rows - knee)

    known = {unit: total(unit), 2 * unit: total(2 * unit)}
    found = largest_batch(total, known, unit, limit, time.monotonic() + 60)
    if found is None:
        assert not fits(total(unit), limit)
        return
    assert found.rows % unit == 0 and found.rows <= MOST_ROWS
    if found.compiled:
        assert fits(total(found.rows), limit)
    if bend == 0:
        assert found.compiled and (found.rows + unit > MOST_ROWS or not fits(total(found.rows + unit), limit))


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=20).map(str.encode), st.data())
def test_pieces_are_the_decoded_text_in_parts_that_are_learnt_and_not(text, data):
    ids_N = np.frombuffer(text, np.uint8).astype(np.int32)
    is_learnt_N = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids_N), max_size=len(ids_N))))
    pieces = decoded(Encoded(ids_N, is_learnt_N), ByteTokenizer())
    whole = text.decode()
    assert len(pieces) == 1 + int((is_learnt_N[1:] != is_learnt_N[:-1]).sum())
    assert [p.is_learnt for p in pieces] == [bool(is_learnt_N[0]) ^ bool(n % 2) for n in range(len(pieces))]
    if whole.isascii():  # a character of several bytes may be in two pieces
        assert "".join(p.text for p in pieces) == whole
        marked = [learnt for p in pieces for learnt in [p.is_learnt] * len(p.text)]
        assert marked == is_learnt_N.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.integers(1, 200))
def test_a_histogram_counts_each_sequence_once_and_shows_what_is_too_long_apart(lengths, row_length):
    bins = histogram(np.array(lengths), row_length)
    assert sum(one.sequences for one in bins) == len(lengths)
    for one, after in zip(bins, [*bins[1:], None], strict=True):
        assert one.sequences == sum(one.first <= n <= one.last for n in lengths)
        assert after is None or after.first == one.last + 1
    assert bins[0].first == 1 and bins[-1].last == max(lengths)
    beyond = [n for n in lengths if n > row_length]
    assert not beyond or (bins[-1].first, bins[-1].sequences) == (row_length + 1, len(beyond))


def test_what_is_cut_is_named_and_lengths_are_those_before_the_cut():
    made = [train.Example("p" * n, "c" * m, origin=f"mine.jsonl:{n}") for n, m in ((3, 2), (30, 4), (40, 30), (9, 9))]
    data = train.glance(train.prepare(ByteTokenizer(), made, max_len=20), made, ByteTokenizer(), samples=4)
    # Each fills a place fewer than it has tokens, the one at which it ends among them.
    assert [(one.origin, one.prompt + one.completion) for one in data.cut] == [
        ("mine.jsonl:40", 50),
        ("mine.jsonl:30", 14),
    ]
    assert data.longest == 70 and data.lengths[-1] == (21, 70, 2)
    assert [sample.tokens for sample in data.samples] == [6, 21, 21, 19]
    assert [sample.pieces[-1].text for sample in data.samples] == ["cc", "cccc", "c" * 20, "c" * 9]


def some_plan():
    made = [
        train.Example(f"{n}\x1b[2J + " * n, f"\u202e{n}\nx\t" * 9 * n, origin=f"mine\n{'x' * 200}:{n}")
        for n in range(1, 9)
    ]
    none = dict.fromkeys((field.name for field in dataclasses.fields(planning.Plan)), None)
    taken = tuple(planning.Taken(n, 12 // n, Memory(**dict.fromkeys(KINDS, 10**9 // n))) for n in (1, 3, 12))
    return planning.Plan(
        **none
        | {
            "data": train.glance(train.prepare(ByteTokenizer(), made, max_len=40), made, ByteTokenizer()),
            **{
                "rows": 12,
                "parts": 3,
                "base": 10**9,
                "evaluations": 4,
                "devices": 8,
                "device": "NVIDIA H100 80GB HBM3",
            },
            "tokens": planning.Tokens(10**9, 10**8, False),
            "taken": (*taken, planning.Taken(6, 2, None)),
            "largest": planning.Largest(MOST_ROWS, False),
            "scored": planning.Scored(planning.Took(0.1, 2.0), 10**8, 19),
        }
    )


KINDS = [field.name for field in dataclasses.fields(Memory)]


@pytest.mark.parametrize("width", [80, 120])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_plan_of_any_size_fits_the_terminal_and_steers_nothing(width, data):
    numbers = st.sampled_from([0, 1, 999, 10**6, 7 * 10**11, 10**15])
    drawn = {name: data.draw(numbers) for name in KINDS}
    own = dataclasses.replace(
        some_plan(),
        steps=10 + data.draw(st.integers(1, 10**7)),
        done=data.draw(st.integers(0, 9)),
        memory=data.draw(st.sampled_from([Memory(**drawn), None])),
        limit=data.draw(st.sampled_from([None, 10**9, 10**12])),
        flops=data.draw(numbers),
        step=data.draw(st.sampled_from([planning.Took(0.01, 2.0), planning.Took(999.0, 9999.0), None])),
        trained={f"params/{'deep/' * data.draw(st.integers(0, 30))}kernel": 10**9 + n for n in range(3)},
        epochs=data.draw(st.sampled_from([None, 0.001, 12345.6])),
    )
    text = plan_text(own, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert not set(text) & set("\x1b\u202e\t\r") and "⟦" in text


def test_a_step_that_does_not_fit_is_not_run_and_auto_takes_the_parts_that_do(monkeypatch):
    lora, adapters = wrapped(), wrapped().init(jax.random.key(0))
    given = {"batches": BATCHES, "loss": squares, "optimizer": optax.sgd(1e-3), "steps": 2}
    # A step of this size takes memory mostly by its rows.
    wide = [np.ones((4096, IN), np.float32)] * 2
    whole, half = (
        train.plan(lora, PARAMS, adapters, seconds=0, **given | {"batches": wide, "accumulate": n}).memory.total
        for n in (1, 2)
    )
    assert half < whole
    monkeypatch.setattr(planning, "room", lambda: int((whole + half) / 2 / 0.9))
    found = train.plan(lora, PARAMS, adapters, seconds=0, **given | {"batches": wide})
    assert found.fits is False and found.step is None and "does not fit" in str(found)
    assert train.plan(lora, PARAMS, adapters, seconds=0, **given | {"batches": wide, "accumulate": "auto"}).parts == 2
    one = {name: given[name] for name in ("loss", "optimizer")} | {"batches": wide}
    assert train.parts_that_fit(lora, PARAMS, adapters, **one) == 2
    for limit, said in ((10, "does not fit a device of 0.0 GB"), (None, "does not tell how much memory")):
        monkeypatch.setattr(planning, "room", lambda limit=limit: limit)
        with pytest.raises(ValueError, match=said):
            train.parts_that_fit(lora, PARAMS, adapters, **one)


def test_a_device_that_tells_nothing_has_the_memory_of_the_machine():
    assert 10**8 < room() * jax.local_device_count() < 10**14
    assert importlib.import_module("os").sysconf("SC_PHYS_PAGES") > 0
    assert on_each(PARAMS) == sum(leaf.nbytes for leaf in PARAMS.values())
