from __future__ import annotations

import dataclasses
import itertools
import random

import grain
import jax
import numpy as np
import pytest

from rslora_jax.train.batches import Batch, heldout_batches, prepare, train_batches
from rslora_jax.train.examples import Example


def some_examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        Example("What is the number? " * rng.randint(1, 6), f"the answer is {n}" + " x" * rng.randint(0, 20))
        for n in range(count)
    ]


def segments(batch: Batch):
    """Each example of a batch: inputs, targets, mask, positions."""
    for row in range(len(batch.tokens_BxT)):
        ids = batch.segment_ids_BxT[row]
        for segment in range(1, ids.max() + 1):
            places = ids == segment
            yield tuple(
                a[row][places] for a in (batch.tokens_BxT, batch.targets_BxT, batch.loss_mask_BxT, batch.positions_BxT)
            )


def assert_equal(left: Batch, right: Batch) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("template", ["chatml", None])
def test_heldout_batches_hold_every_example_once_with_its_answer_as_the_loss(make_tokenizer, template, packed):
    tokenizer, examples = make_tokenizer(template), some_examples(45)
    batches = list(heldout_batches(prepare(tokenizer, examples, max_len=160, packed=packed), batch_size=4))
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)

    answers = []
    for batch in batches:
        assert {a.shape for a in batch} == {(4, 160)}
        assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
        for tokens, targets, mask, positions in segments(batch):
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
            answers.append(tokenizer.decode(targets[mask == 1]))
            assert answers[-1].removesuffix(end) not in tokenizer.decode(targets[mask == 0])
    assert sorted(answers) == sorted(example.completion + end for example in examples)


def test_places_without_an_example_are_blank(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    rows = prepare(tokenizer, some_examples(9), max_len=160)
    batches = list(heldout_batches(rows, batch_size=4))
    for batch in batches:
        blank = batch.segment_ids_BxT == 0
        assert (batch.tokens_BxT[blank] == tokenizer.pad_id).all()
        assert (batch.targets_BxT[blank] == tokenizer.pad_id).all()
        assert not batch.loss_mask_BxT[blank].any() and not batch.positions_BxT[blank].any()
        # Segments count up from 1 and blanks come last, so a row that is read from its left is contiguous.
        for ids in batch.segment_ids_BxT:
            filled = ids[ids > 0]
            assert (np.diff(filled) >= 0).all() and (np.diff(filled) <= 1).all()
            assert (ids[len(filled) :] == 0).all()
    places = sum(int((batch.segment_ids_BxT > 0).sum()) for batch in batches)
    assert places == rows.statistics.tokens
    assert sum(batch.loss_mask_BxT.sum() for batch in batches) == rows.statistics.loss_tokens


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(make_tokenizer):
    rows = prepare(make_tokenizer("chatml"), some_examples(60), max_len=160)
    count = len(rows.rows)
    batches = train_batches(rows, batch_size=count, seed=3)
    whole = sorted(map(bytes, np.concatenate([b.tokens_BxT for b in heldout_batches(rows, batch_size=1)])))
    epochs = [list(map(bytes, batches[n].tokens_BxT)) for n in range(3)]
    assert all(sorted(epoch) == whole for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_resumed_run_goes_on_exactly(make_tokenizer):
    def batches():
        return train_batches(prepare(make_tokenizer("chatml"), some_examples(40), max_len=96), batch_size=4, seed=7)

    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    whole = iter(batches().to_iter_dataset(reading))
    for n in range(30):
        assert_equal(next(whole), batches()[n])
    resumed = iter(batches().to_iter_dataset(reading))
    resumed.set_state(whole.get_state())
    assert_equal(next(resumed), batches()[30])
    assert_equal(next(whole), batches()[30])


def test_the_seed_decides_the_order(make_tokenizer):
    rows = prepare(make_tokenizer("chatml"), some_examples(40), max_len=96)
    runs = [[bytes(train_batches(rows, batch_size=4, seed=s)[n].tokens_BxT) for n in range(40)] for s in (0, 1)]
    assert not set(runs[0]) & set(runs[1])


def test_fewer_rows_than_a_batch_still_fill_it(make_tokenizer):
    rows = prepare(make_tokenizer(None), [Example("x", "y")], max_len=8)
    assert train_batches(rows, batch_size=5)[2].loss_mask_BxT.sum() == 5 * rows.statistics.loss_tokens


def test_packing_wastes_little_and_the_statistics_say_how_much(make_tokenizer):
    tokenizer, examples = make_tokenizer("chatml"), some_examples(400)
    packed = prepare(tokenizer, examples, max_len=512).statistics
    padded = prepare(tokenizer, examples, max_len=512, packed=False).statistics
    assert packed.padding < 0.05 < 0.5 < padded.padding
    assert (packed.tokens, packed.loss_tokens) == (padded.tokens, padded.loss_tokens)
    assert padded.rows == padded.examples == 400
    assert str(packed).startswith("400 examples, ")


def test_what_is_cut_is_counted_and_said(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    examples = [Example("x", "y"), Example("the number " * 40, "y"), Example("x", "the number " * 40)]
    whole = prepare(tokenizer, examples, max_len=2000).statistics
    rows = prepare(tokenizer, examples, max_len=32)
    assert (rows.statistics.prompts_cut, rows.statistics.completions_cut) == (2, 1)
    assert whole.tokens - rows.statistics.tokens == rows.statistics.tokens_cut > 0
    assert "tokens cut to fit, from 2 prompts and 1 completions" in str(rows.statistics)
    assert "cut" not in str(whole)


@pytest.mark.parametrize("packed", [True, False])
def test_text_longer_than_a_row_is_split_and_every_token_is_learnt_once(make_tokenizer, packed):
    tokenizer = make_tokenizer("chatml")
    texts = ["the number " * 40 + str(n) for n in range(5)] + ["the answer"]
    whole = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    rows = prepare(tokenizer, [Example("", text) for text in texts], max_len=24, packed=packed)
    learnt = [
        (int(token), int(target))
        for batch in heldout_batches(rows, batch_size=3)
        for tokens, targets, mask, _ in segments(batch)
        for token, target in zip(tokens[mask == 1], targets[mask == 1], strict=True)
    ]
    assert sorted(learnt) == sorted(pair for ids in whole for pair in itertools.pairwise(ids))
    statistics = rows.statistics
    assert statistics.tokens == statistics.loss_tokens == sum(len(ids) - 1 for ids in whole)
    assert statistics.sequences == sum(-(-(len(ids) - 1) // 24) for ids in whole) > statistics.examples == 6
    assert "cut" not in str(statistics)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_of_a_batch_are_the_batch_however_many_processes_there_are(make_tokenizer, processes):
    rows, size = prepare(make_tokenizer("chatml"), some_examples(50), max_len=96), 8 // processes
    shares = [slice(p * size, (p + 1) * size) for p in range(processes)]
    whole = train_batches(rows, batch_size=8, seed=5)
    parts = [train_batches(rows, batch_size=8, seed=5, share=share) for share in shares]
    held, held_parts = (
        heldout_batches(rows, batch_size=8),
        [heldout_batches(rows, batch_size=8, share=s) for s in shares],
    )
    assert len(rows.rows) % 8 and {len(part) for part in held_parts} == {len(held)}
    wanted = [whole[n] for n in (0, 1, 4, 1000)] + list(held)
    given = [[part[n] for part in parts] for n in (0, 1, 4, 1000)] + list(zip(*held_parts, strict=True))
    for batch, pieces in zip(wanted, given, strict=True):
        assert {piece.tokens_BxT.shape for piece in pieces} == {(size, 96)}
        assert_equal(batch, Batch(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))))


def test_an_iterator_over_a_share_goes_on_from_its_state(make_tokenizer):
    rows = prepare(make_tokenizer("chatml"), some_examples(40), max_len=96)
    batches = train_batches(rows, batch_size=8, seed=7, share=slice(2, 6))
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    begun = iter(batches.to_iter_dataset(reading))
    for _ in range(13):
        next(begun)
    resumed = iter(batches.to_iter_dataset(reading))
    resumed.set_state(begun.get_state())
    rest = batches[13:]
    for n in range(10):
        assert_equal(next(resumed), rest[n])
        assert_equal(next(begun), rest[n])


def test_only_the_rows_of_the_share_are_read(make_tokenizer):
    rows = prepare(make_tokenizer(None), some_examples(12), max_len=160, packed=False)
    broken = dataclasses.replace(rows, sequences=(rows.sequences[0],) * 2 + (None,) * 10)
    assert heldout_batches(broken, batch_size=12, share=slice(0, 2))[0].tokens_BxT.shape == (2, 160)
    with pytest.raises(AttributeError):
        heldout_batches(broken, batch_size=12)[0]


def test_a_batch_is_a_pytree_and_one_shape_compiles_once(make_tokenizer):
    batches = train_batches(prepare(make_tokenizer("chatml"), some_examples(40), max_len=96), batch_size=4)
    traces = []

    @jax.jit
    def count(batch: Batch):
        traces.append(1)
        return batch.loss_mask_BxT.sum()

    sums = [float(count(batches[n])) for n in range(3)]
    assert len(traces) == 1
    assert sums == [batches[n].loss_mask_BxT.sum() for n in range(3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(examples=[], max_len=8), "no examples"),
        (dict(examples=some_examples(1), max_len=0), "max_len is 0"),
    ],
)
def test_prepare_refuses_what_it_cannot_do(make_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(make_tokenizer(None), **arguments)


@pytest.mark.parametrize("make", [train_batches, heldout_batches])
def test_a_batch_of_nothing_is_refused(make_tokenizer, make):
    rows = prepare(make_tokenizer(None), some_examples(1), max_len=8)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(rows, batch_size=0)
    for share in (slice(8, 12), slice(4, 9), slice(2, 2)):
        with pytest.raises(ValueError, match=r"share is slice\(.*; give rows that a batch of 8 has"):
            make(rows, batch_size=8, share=share)
