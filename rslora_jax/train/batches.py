"""Batches of tokens, each a pure function of the seed and its number."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rslora_jax.train.encode import Encoded, Tokenizer, Tokens, cut, encode_example, windows
from rslora_jax.train.examples import Example
from rslora_jax.train.packing import pack
from rslora_jax.train.tokens import Progress, tokenise

if TYPE_CHECKING:
    import grain


class Batch(NamedTuple):
    """Hold B rows of T tokens as a pytree of arrays, always of one shape, so a step compiles once.

    The shift is done here: `targets_BxT[b, t]` is the token that follows `tokens_BxT[b, t]` in its example,
    so logits at t are scored against targets at t, with weight `loss_mask_BxT[b, t]`. An example of n
    tokens fills n - 1 places; its last token is only a target.

    - tokens_BxT: int32, what the model reads; `pad_id` where there is no example.
    - targets_BxT: int32, what it should predict; `pad_id` where there is no example.
    - loss_mask_BxT: float32, 1 where the target is learnt, else 0.
    - positions_BxT: int32, from 0 within each example; 0 where there is none.
    - segment_ids_BxT: int32, 1, 2, ... for the examples of a row, 0 where there is none. Attention stays
      between equal ids.
    """

    tokens_BxT: np.ndarray
    targets_BxT: np.ndarray
    loss_mask_BxT: np.ndarray
    positions_BxT: np.ndarray
    segment_ids_BxT: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """Count what a data set holds, and what was cut to make it fit. Printed, it is a line or two.

    `sequences` is above `examples` where a chat had to be taken apart (see `encode_example`) or a text split
    (see `windows`). `tokens` are those the model reads, `loss_tokens` those it learns, `padding` the part of
    all places that is empty.
    """

    examples: int
    sequences: int
    tokens: int
    loss_tokens: int
    rows: int
    row_length: int
    padding: float
    prompts_cut: int
    completions_cut: int
    tokens_cut: int

    def __str__(self) -> str:
        line = (
            f"{self.examples:,} examples, {self.tokens:,} tokens ({self.loss_tokens:,} with loss) "
            f"in {self.rows:,} rows of {self.row_length:,} ({self.padding:.1%} padding)"
        )
        if self.tokens_cut:
            line += (
                f"\n{self.tokens_cut:,} tokens cut to fit, from {self.prompts_cut:,} prompts "
                f"and {self.completions_cut:,} completions"
            )
        return line


@dataclass(frozen=True, eq=False)
class Rows:
    """Hold encoded examples and which of them share each row, ready to be batched. See `prepare`.

    `owners` says of which example, by number, each sequence is.
    """

    sequences: tuple[Encoded, ...]
    owners: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    max_len: int
    pad_id: int
    statistics: Statistics

    @property
    def places(self) -> int:
        """The largest number of tokens with loss in one row, at least 1."""
        learnt = [int(encoded.is_learnt_N[1:].sum()) for encoded in self.sequences]
        return max(1, *(sum(learnt[i] for i in row) for row in self.rows))


def prepare(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    max_len: int,
    packed: bool = True,
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    skipped: list[str] | None = None,
) -> Rows:
    """Encode examples, make those fit that are too long, and lay them out in rows of `max_len`.

    Plain text that does not fit is split (see `windows`), everything else is cut (see `cut`). Packed, several
    examples share a row, and the model must obey segment ids and positions. For a model that does not,
    `packed=False` gives each its own row, padded at the right, which a causal model cannot see.

    `workers`, `cache` and `progress` are `tokenise`'s: how many processes encode, in which folder the tokens are
    kept for the next run, and what is called with (examples done, examples in all) on the way. Where `skipped` is
    given, examples that cannot be encoded are left out, and told in it.

    Raises:
      ValueError: there are no examples, `max_len` is below 1, an example cannot be encoded, or `workers` or
        `cache` cannot be used.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> sums = [Example("1+1=", "2"), Example("2+2=", "4"), Example("40+2=", "42")]
    >>> print(prepare(ByteTokenizer(), sums, max_len=12).statistics)
    3 examples, 17 tokens (7 with loss) in 2 rows of 12 (29.2% padding)
    """
    if max_len < 1:
        raise ValueError(f"max_len is {max_len}; it must be at least 1")
    if not examples:
        raise ValueError("there are no examples to prepare; give at least one")
    skip_bad = skipped is not None
    tokens = tokenise(tokenizer, examples, workers=workers, cache=cache, progress=progress, skip_bad=skip_bad)
    left_out = _left_out(tokenizer, examples, tokens, skipped)
    owned = [
        (owner, short)
        for owner, (example, found) in enumerate(zip(examples, tokens.by_example(), strict=True))
        for whole in found
        for short in (windows(whole, max_len + 1) if example.prompt == "" else [cut(whole, max_len + 1)])
    ]
    owners, sequences = zip(*owned, strict=True)
    lengths = [len(encoded.ids_N) - 1 for encoded in sequences]
    rows = tuple(pack(lengths, max_len, seed=seed)) if packed else tuple((i,) for i in range(len(sequences)))
    statistics = Statistics(
        examples=len(examples) - left_out,
        sequences=len(sequences),
        tokens=sum(lengths),
        loss_tokens=sum(int(encoded.is_learnt_N.sum()) for encoded in sequences),
        rows=len(rows),
        row_length=max_len,
        padding=1 - sum(lengths) / (len(rows) * max_len),
        prompts_cut=sum(encoded.cut[0] > 0 for encoded in sequences),
        completions_cut=sum(encoded.cut[1] > 0 for encoded in sequences),
        tokens_cut=sum(sum(encoded.cut) for encoded in sequences),
    )
    return Rows(sequences, owners, rows, max_len, tokenizer.pad_id, statistics)


def joined(parts: Sequence[Rows], counts: Sequence[int]) -> Rows:
    """Give the rows of several as those of one, one part after the other; none of theirs is packed anew.

    `counts` says of how many examples each part was made.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> part = prepare(ByteTokenizer(), [Example("1+1=", "2")], max_len=8)
    >>> joined([part, part], [1, 1]).rows
    ((0,), (1,))
    """
    first, rows, owners = parts[0], list[tuple[int, ...]](), list[int]()
    sequences, examples = list[Encoded](), 0
    for part, count in zip(parts, counts, strict=True):
        rows += [tuple(n + len(sequences) for n in row) for row in part.rows]
        owners += [owner + examples for owner in part.owners]
        sequences += part.sequences
        examples += count
    counted = dataclasses.asdict(first.statistics)
    total = {name: sum(getattr(part.statistics, name) for part in parts) for name in counted}
    padding = 1 - total["tokens"] / (total["rows"] * first.max_len)
    statistics = Statistics(**{**total, "row_length": first.max_len, "padding": padding})
    return Rows(tuple(sequences), tuple(owners), tuple(rows), first.max_len, first.pad_id, statistics)


def _left_out(tokenizer: Tokenizer, examples: Sequence[Example], tokens: Tokens, skipped: list[str] | None) -> int:
    """Count the examples without a sequence, which cannot be encoded, and tell why; an error where none is to be."""
    bad = np.flatnonzero(tokens.sequences_E == 0).tolist()
    for n in bad:
        try:
            encode_example(tokenizer, examples[n])
        except ValueError as error:
            if skipped is None or len(bad) == len(examples):
                raise
            skipped.append(str(error))
    return len(bad)


def train_batches(
    rows: Rows,
    *,
    batch_size: int,
    seed: int = 0,
    share: slice | None = None,
    mixed: Sequence[tuple[int, float]] = (),
) -> grain.MapDataset[Batch]:
    """Give the endless training batches, by number: `train_batches(...)[n]` is a `Batch`.

    Batch n depends on the arguments and n alone, so a run resumes exactly by going on from its step's number.
    Each epoch is its own shuffle of the rows and has each row once; a batch may end one epoch and begin the
    next. Which examples share a row stays the same, so that batch n needs no packing of the epochs before.

    Where several processes feed one batch, `share` says which of its `batch_size` rows are made here: all
    processes have the same order, and their shares, one after the other, are the batch bit for bit.

    `mixed` says of rows that are `joined` how many each part has, and its weight: of all rows that are learnt from,
    each part's are such a share, as evenly as can be, and each goes through its own epochs.

    Raises:
      ValueError: `batch_size` is below 1, or `share` has no rows or goes beyond the batch.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> rows = prepare(ByteTokenizer(), [Example("1+1=", "2"), Example("2+2=", "4")], max_len=8)
    >>> train_batches(rows, batch_size=3)[10**6].tokens_BxT.shape
    (3, 8)
    >>> train_batches(rows, batch_size=4, share=slice(2, 4))[10**6].tokens_BxT.shape
    (2, 8)
    """
    share = _checked_share(batch_size, share)
    order = _mixed(mixed, seed) if mixed else _shuffled(len(rows.rows), seed)
    return order.batch(batch_size).map(lambda numbers_B: _batch(rows, [rows.rows[n] for n in numbers_B[share]]))


def _shuffled(count: int, seed: int | tuple[int, int], start: int = 0) -> grain.MapDataset[int]:
    """Give so many numbers from `start` on, again and again, each time in another order."""
    # grain shuffles epoch e with seed + e: hashed seeds keep run 1 from being run 0, an epoch late.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return _numbers(count, start).shuffle(seed=hashed).repeat()


def _mixed(parts: Sequence[tuple[int, float]], seed: int) -> grain.MapDataset[int]:
    """Give the numbers of rows of several parts by their weights."""
    import grain

    starts = itertools.accumulate((count for count, _ in parts), initial=0)
    orders = [
        _shuffled(count, (seed, n), start) for n, ((count, _), start) in enumerate(zip(parts, starts, strict=False))
    ]
    return grain.MapDataset.mix(orders, [weight for _, weight in parts])


def heldout_batches(rows: Rows, *, batch_size: int, share: slice | None = None) -> grain.MapDataset[Batch]:
    """Give batches that hold every example exactly once, the last one filled up with empty rows.

    `share` is as in `train_batches`.

    Raises:
      ValueError: `batch_size` is below 1, or `share` has no rows or goes beyond the batch.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> rows = prepare(ByteTokenizer(), [Example("1+1=", "2")], max_len=8)
    >>> batch, = heldout_batches(rows, batch_size=2)
    >>> batch.loss_mask_BxT.sum(axis=1).tolist()
    [2.0, 0.0]
    """
    share = _checked_share(batch_size, share)
    filled = math.ceil(len(rows.rows) / batch_size) * batch_size
    padded = rows.rows + ((),) * (filled - len(rows.rows))
    order = _numbers(filled)
    return order.batch(batch_size).map(lambda numbers_B: _batch(rows, [padded[n] for n in numbers_B[share]]))


def _numbers(count: int, start: int = 0) -> grain.MapDataset[int]:
    """Give so many numbers from `start` on. Only here is grain needed: steps and losses are used without it."""
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches need grain: pip install 'rslora_jax[train]'") from error
    return grain.MapDataset.range(start, start + count)


def _checked_share(batch_size: int, share: slice | None) -> slice:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    share = share or slice(None)
    if not range(batch_size)[share] or (share.stop or 0) > batch_size:
        raise ValueError(f"share is {share}; give rows that a batch of {batch_size} has")
    return share


def _batch(rows: Rows, chosen: Sequence[tuple[int, ...]]) -> Batch:
    shape = (len(chosen), rows.max_len)
    batch = Batch(
        tokens_BxT=np.full(shape, rows.pad_id, np.int32),
        targets_BxT=np.full(shape, rows.pad_id, np.int32),
        loss_mask_BxT=np.zeros(shape, np.float32),
        positions_BxT=np.zeros(shape, np.int32),
        segment_ids_BxT=np.zeros(shape, np.int32),
    )
    for row, members in enumerate(chosen):
        start = 0
        for segment, index in enumerate(members, start=1):
            encoded = rows.sequences[index]
            places = row, slice(start, start + len(encoded.ids_N) - 1)
            batch.tokens_BxT[places] = encoded.ids_N[:-1]
            batch.targets_BxT[places] = encoded.ids_N[1:]
            batch.loss_mask_BxT[places] = encoded.is_learnt_N[1:]
            batch.positions_BxT[places] = np.arange(len(encoded.ids_N) - 1)
            batch.segment_ids_BxT[places] = segment
            start += len(encoded.ids_N) - 1
    return batch
