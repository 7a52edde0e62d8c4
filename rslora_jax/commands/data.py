"""The data of `rslora train` and `rslora eval`: which examples are learnt from, and which are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.train import docstring_pairs, read_examples

# How many of the docstrings' held-out half are scored where nothing is asked for.
_OF_DOCSTRINGS = 32


class Asked(NamedTuple):
    """Hold what of a run's flags, or of what it was started with, says which examples are held out.

    Runs that were begun by `rule` 1 held out every tenth line and scored so many of them; those not scored were learnt
    from as little. By rule 2 what is held out is what is scored, and every other line is learnt from.
    """

    data: str | None
    heldout: int | None = None
    eval_data: str | None = None
    rule: int = 2

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Asked:
        """Return what the settings of a run say."""
        rule = settings.get("examples", {}).get("rule", 1)
        return Asked(settings.get("data"), settings.get("heldout"), settings.get("eval_data"), rule)


def examples(asked: Asked) -> tuple[list[Any], list[Any]]:
    """Return (training examples, held-out ones).

    Without a file, the docstrings of Python. Of a file every tenth example is held out, of fewer than ten the last; or
    as many as `heldout` asks for, spread evenly over it. All others are learnt from: none is in neither. With
    `eval_data` that file is what is held out, and all of the data are learnt from.

    Raises:
      ValueError: a file cannot be read, or no example is left to learn from.
    """
    if asked.eval_data is not None:
        if asked.heldout == 0:
            raise ValueError(f"--heldout 0 scores nothing, and --eval-data {asked.eval_data} all of it: leave one out")
        held = read_examples(asked.eval_data)
        return all_of(asked.data), spread(held, asked.heldout or len(held))
    if asked.data is None:
        training, held = list(docstring_pairs("train")), list(docstring_pairs("heldout"))
        if asked.heldout == 0:
            return training + held, []
        return training, spread(held, asked.heldout or _OF_DOCSTRINGS)
    everything = all_of(asked.data)
    chosen = _held_out(len(everything), asked)
    scored = [everything[n] for n in chosen]
    rest = _tenths(len(everything)) if asked.rule == 1 else chosen
    training = [example for n, example in enumerate(everything) if n not in set(rest)]
    if not training:
        raise ValueError(
            f"{asked.data} has {len(everything)} examples, and --heldout {asked.heldout} holds out all of them: "
            "ask for fewer"
        )
    return training, scored


def all_of(data: str | None) -> list[Any]:
    """Return every example of a file, or of the docstrings of Python."""
    return read_examples(data) if data is not None else [*docstring_pairs("train"), *docstring_pairs("heldout")]


def _held_out(count: int, asked: Asked) -> list[int]:
    """Return which of so many examples are held out and scored, counted from 0.

    >>> _held_out(20, Asked("a")), _held_out(20, Asked("a", 4)), _held_out(3, Asked("a")), _held_out(20, Asked("a", 0))
    ([9, 19], [4, 9, 14, 19], [2], [])
    """
    if asked.rule == 1:
        return spread(_tenths(count), _OF_DOCSTRINGS if asked.heldout is None else asked.heldout)
    if asked.heldout is None:
        return _tenths(count)
    wanted = min(asked.heldout, count)
    return [(n + 1) * count // wanted - 1 for n in range(wanted)]


def _tenths(count: int) -> list[int]:
    return list(range(9, count, 10) or range(1, count)[-1:])


def said(asked: Asked, training: Sequence[Any], heldout: Sequence[Any]) -> str:
    """Say in a line what of the data is learnt from and what is held out."""
    data = asked.data or "the docstrings of Python"
    if not heldout:
        return f"{data}: all {len(training):,} examples are learnt from; none is held out, so none is scored"
    if asked.eval_data is not None:
        return (
            f"{data}: all {len(training):,} examples are learnt from; {len(heldout):,} of {asked.eval_data} are scored"
        )
    return f"{data}: {len(training):,} examples are learnt from, {len(heldout):,} are held out and scored"


def to_score(
    source: str | None, everything: Sequence[Any] | None, runs: Sequence[Mapping[str, Any]], most: int | None = None
) -> list[Any]:
    """Return the examples on which to score runs: none that one of them has learnt from.

    Args:
      source: the file; None for the docstrings of Python.
      everything: the file's examples.
      runs: what the runs were started with.
      most: how many to return at most, spread evenly; by default as many as the first run scored of its own data, of
        other data all.

    Raises:
      ValueError: none is left.
    """
    first = Asked.of(runs[0]) if runs else Asked(None)
    its_own = [asked for asked in map(Asked.of, runs) if _same(asked.data, source)]
    if everything is None:
        left = [] if first.heldout == 0 else list(docstring_pairs("heldout"))
    else:
        unlearnt = [_unlearnt(len(everything), asked) for asked in its_own]
        left = [example for n, example in enumerate(everything) if all(n in some for some in unlearnt)]
    if not left:
        raise ValueError(
            f"all of {source or 'the docstrings of Python'} was learnt from: give other examples with --data, or score "
            "these all the same with --all"
        )
    if first in its_own or source == first.eval_data:
        most = most or first.heldout or (_OF_DOCSTRINGS if first.rule == 1 or source is None else None)
    return spread(left, most or len(left))


def _unlearnt(count: int, asked: Asked) -> set[int]:
    """Return which of so many examples a run has not learnt from."""
    if asked.eval_data is not None:
        return set()
    return set(_tenths(count) if asked.rule == 1 else _held_out(count, asked))


def _same(one: str | None, other: str | None) -> bool:
    return one == other if one is None or other is None else Path(one).resolve() == Path(other).resolve()


def spread(chosen: list[Any], limit: int) -> list[Any]:
    """Give at most `limit` of a list, spread evenly over it.

    >>> spread([1, 2, 3, 4, 5], 3), spread([1, 2], 0)
    ([1, 3, 5], [])
    """
    return chosen[:: max(1, -(-len(chosen) // limit))] if limit else []
