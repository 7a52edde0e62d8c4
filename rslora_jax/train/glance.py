"""What a data set looks like to the model: some of it decoded, how long it is, and what is cut."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rslora_jax.train.batches import Rows, Statistics
from rslora_jax.train.encode import Encoded, Tokenizer
from rslora_jax.train.examples import Example

_BINS = 8


class Piece(NamedTuple):
    """Hold a text, and whether its tokens are learnt."""

    text: str
    is_learnt: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """Hold one sequence as the model meets it: where it is from, its tokens decoded, and how many there are."""

    origin: str
    pieces: tuple[Piece, ...]
    tokens: int
    learnt: int


class Cut(NamedTuple):
    """Say of which example how many tokens were cut, of its prompt and of its completion."""

    origin: str
    prompt: int
    completion: int


class Bin(NamedTuple):
    """Count the sequences of `first` to `last` tokens; those of the last bin are cut, where it begins beyond a row."""

    first: int
    last: int
    sequences: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Hold what a data set looks like to the model.

    Attributes:
      statistics: what it holds in all.
      samples: its first sequences, decoded.
      lengths: a histogram of the sequences by the places that they would fill uncut; above `row_length` all in one.
      middle, longest: the median of these places, and the most.
      cut: each sequence that was cut, those that lost most first.
      together: how many sequences a row holds on average.
    """

    statistics: Statistics
    samples: tuple[Sample, ...]
    lengths: tuple[Bin, ...]
    middle: int
    longest: int
    cut: tuple[Cut, ...]
    together: float


def glance(rows: Rows, examples: Sequence[Example], tokenizer: Tokenizer, *, samples: int = 2) -> Data:
    """Look at prepared data.

    Args:
      rows: of `prepare`.
      examples: those it was given.
      tokenizer: the tokenizer it was given.
      samples: how many sequences to decode.

    >>> from rslora_jax.train.batches import prepare
    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> sums = [Example("1+1=", "2", origin="sums.jsonl:1"), Example("40+2=", "42", origin="sums.jsonl:2")]
    >>> data = glance(prepare(ByteTokenizer(), sums, max_len=6), sums, ByteTokenizer(), samples=1)
    >>> data.samples[0].pieces
    (Piece(text='1+1=', is_learnt=False), Piece(text='2', is_learnt=True))
    >>> data.cut
    (Cut(origin='sums.jsonl:2', prompt=1, completion=0),)
    """
    places_S = np.array([len(one.ids_N) + sum(one.cut) - 1 for one in rows.sequences])
    origins = [examples[owner].origin or f"example {owner + 1}" for owner in rows.owners]
    of_cut = [Cut(origin, *one.cut) for origin, one in zip(origins, rows.sequences, strict=True) if sum(one.cut)]
    return Data(
        statistics=rows.statistics,
        samples=tuple(_sample(*one, tokenizer) for one in list(zip(origins, rows.sequences, strict=True))[:samples]),
        lengths=histogram(places_S, rows.max_len),
        middle=int(np.median(places_S)),
        longest=int(places_S.max()),
        cut=tuple(sorted(of_cut, key=lambda one: -one.prompt - one.completion)),
        together=len(rows.sequences) / len(rows.rows),
    )


def _sample(origin: str, encoded: Encoded, tokenizer: Tokenizer) -> Sample:
    pieces = tuple(decoded(encoded, tokenizer))
    return Sample(origin, pieces, len(encoded.ids_N), int(encoded.is_learnt_N.sum()))


def decoded(encoded: Encoded, tokenizer: Tokenizer) -> list[Piece]:
    """Decode tokens, special ones among them, in the pieces that are learnt and those that are not.

    A piece is what its tokens add to the text before them: alone, some would decode otherwise, as those that begin
    with a space.
    """
    is_learnt_N = encoded.is_learnt_N
    ends = [*(np.flatnonzero(np.diff(is_learnt_N)) + 1).tolist(), len(is_learnt_N)]
    pieces, before = [], ""
    for end in ends:
        text = tokenizer.decode(encoded.ids_N[:end].tolist(), skip_special=False)
        # Of a character whose bytes are in two pieces the first has a stand-in, which the second replaces.
        shared = os.path.commonprefix([before, text])
        pieces.append(Piece(text[len(shared) :], bool(is_learnt_N[end - 1])))
        before = text
    return pieces


def histogram(places_S: np.ndarray, row_length: int) -> tuple[Bin, ...]:
    """Count sequences by length, in some bins of one width up to a row's length, and one for all that is longer.

    >>> for one in histogram(np.array([1, 3, 4, 9]), 4):
    ...     print(*one)
    1 1 1
    2 2 0
    3 3 1
    4 4 1
    5 9 1
    """
    most = min(int(places_S.max()), row_length)
    width = -(-most // _BINS)
    bins = []
    for first in range(1, most + 1, width):
        last = min(first + width - 1, most)
        bins.append(Bin(first, last, int(((places_S >= first) & (places_S <= last)).sum())))
    beyond = places_S[places_S > row_length]
    return (*bins, Bin(row_length + 1, int(beyond.max()), len(beyond))) if len(beyond) else tuple(bins)
