"""Which examples of a run are learnt from and which are held out, and which of them `rslora eval` scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.commands.sources import Data, columns_of, shown_data, sources_of
from rslora_jax.train import docstring_pairs, read_examples

# How many of the docstrings' held-out half are scored where nothing is asked for.
_OF_DOCSTRINGS = 32


class Asked(NamedTuple):
    """Hold what of a run's flags, or of what it was started with, says which examples are held out.

    Runs that were begun by `rule` 1 held out every tenth line and scored so many of them; those not scored were learnt
    from as little. By rule 2 what is held out is what is scored, and every other line is learnt from. `columns` is
    what `--columns` says.
    """

    data: Data
    heldout: int | None = None
    eval_data: str | None = None
    rule: int = 2
    columns: str | None = None

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Asked:
        """Return what the settings of a run say."""
        rule = settings.get("examples", {}).get("rule", 1)
        named = {name: settings.get(name) for name in ("heldout", "eval_data", "columns")}
        return Asked(settings.get("data"), rule=rule, **named)


class Split(NamedTuple):
    """Hold the examples that are learnt from, file by file where these have shares, and those that are held out."""

    parts: tuple[list[Any], ...]
    heldout: list[Any]

    @property
    def training(self) -> list[Any]:
        """All that are learnt from."""
        return [example for part in self.parts for example in part]


def split(asked: Asked, skipped: list[str] | None = None) -> Split:
    """Return which examples are learnt from and which are held out.

    Without a file, the docstrings of Python. Of files every tenth example is held out, of fewer than ten the last; or
    as many as `heldout` asks for, spread evenly over them. All others are learnt from: none is in neither. With
    `eval_data` that file is what is held out, and all of the data are learnt from.

    Args:
      asked: what the flags say.
      skipped: where it is given, bad rows are left out, and told in it.

    Raises:
      ValueError: a file cannot be read, or no example is left to learn from.
    """
    if asked.eval_data is not None and asked.heldout == 0:
        raise ValueError(f"--heldout 0 scores nothing, and --eval-data {asked.eval_data} all of it: leave one out")
    files = _files(asked.data, asked.columns, skipped)
    if asked.eval_data is not None:
        held = all_of(asked.eval_data, asked.columns, skipped)
        files = ([*files[0], *files[1]],) if asked.data is None else files
        return Split(files, spread(held, asked.heldout or len(held)))
    if asked.data is None:
        training, held = files
        if asked.heldout == 0:
            return Split((training + held,), [])
        return Split((training,), spread(held, asked.heldout or _OF_DOCSTRINGS))
    everything = [example for file in files for example in file]
    chosen = _held_out(len(everything), asked)
    taken = set(_tenths(len(everything)) if asked.rule == 1 else chosen)
    numbers, parts = iter(range(len(everything))), []
    for file, source in zip(files, _named(asked.data), strict=True):
        parts.append([example for example, n in zip(file, numbers, strict=False) if n not in taken])
        if not parts[-1]:
            what = f"--heldout {asked.heldout} holds out" if asked.heldout else "what is held out is"
            raise ValueError(f"{source} has {len(file)} examples, and {what} all of them: ask for fewer")
    return Split(tuple(parts), [everything[n] for n in chosen])


def all_of(data: Data, columns: str | None = None, skipped: list[str] | None = None) -> list[Any]:
    """Return every example of files, or of the docstrings of Python."""
    return [example for file in _files(data, columns, skipped) for example in file]


def _named(data: Data) -> list[str]:
    """Return the files by which the examples are kept apart: each where they have shares, else all as one."""
    sources = sources_of(data)
    return [source.path for source in sources] if sources[0].weight is not None else [shown_data(data)]


def _files(data: Data, columns: str | None, skipped: list[str] | None) -> tuple[list[Any], ...]:
    """Return the examples of each file of its own share; of docstrings those of training and the others."""
    if data is None:
        return list(docstring_pairs("train")), list(docstring_pairs("heldout"))
    sources, names = sources_of(data), columns_of(columns)
    files = [read_examples(source.path, columns=names, skipped=skipped) for source in sources]
    return tuple(files) if sources[0].weight is not None else ([example for file in files for example in file],)


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


def said(asked: Asked, found: Split) -> str:
    """Say in a line what of the data is learnt from and what is held out."""
    data, learnt, held = shown_data(asked.data), len(found.training), len(found.heldout)
    if not held:
        return f"{data}: all {learnt:,} examples are learnt from; none is held out, so none is scored"
    if asked.eval_data is not None:
        return f"{data}: all {learnt:,} examples are learnt from; {held:,} of {asked.eval_data} are scored"
    return f"{data}: {learnt:,} examples are learnt from, {held:,} are held out and scored"


def to_score(
    source: Data, everything: Sequence[Any] | None, runs: Sequence[Mapping[str, Any]], most: int | None = None
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
    learnt = {place for asked in map(Asked.of, runs) if _overlap(asked.data, source) for place in _learnt(asked)}
    if everything is None:
        left = [] if first.heldout == 0 else list(docstring_pairs("heldout"))
    else:
        unlearnt = [_unlearnt(len(everything), asked) for asked in its_own]
        left = [example for n, example in enumerate(everything) if all(n in some for some in unlearnt)]
        left = [example for example in left if _place(example) not in learnt] if learnt else left
    if not left:
        raise ValueError(
            f"all of {shown_data(source)} was learnt from: give other examples with --data, or score "
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


def _same(one: Data, other: Data) -> bool:
    """Say whether one names the files that the other does."""
    return _paths(one) == _paths(other)


def _overlap(one: Data, other: Data) -> bool:
    """Say whether two that are not the same have a file in common."""
    return not _same(one, other) and bool({*_paths(one)} & {*_paths(other)})


def _paths(data: Data) -> list[Path]:
    return [Path(source.path).resolve() for source in sources_of(data)]


def _learnt(asked: Asked) -> list[tuple[Path, str]]:
    """Return the places of what a run has learnt from."""
    return [_place(example) for example in split(asked, []).training]


def _place(example: Any) -> tuple[Path, str]:
    path, _, number = example.origin.rpartition(":")
    return Path(path).resolve(), number


def spread(chosen: list[Any], limit: int) -> list[Any]:
    """Give at most `limit` of a list, spread evenly over it.

    >>> spread([1, 2, 3, 4, 5], 3), spread([1, 2], 0)
    ([1, 3, 5], [])
    """
    return chosen[:: max(1, -(-len(chosen) // limit))] if limit else []
