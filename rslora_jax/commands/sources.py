"""The files of data that a command line names, with their shares, and what their columns are called."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.commands.flags import Number

# As a command line or a run's settings have it: no file, one, or several with or without a weight behind a "=".
Data = str | Sequence[str] | None


class Source(NamedTuple):
    """Hold a file, and its share of what is learnt from, where shares are given."""

    path: str
    weight: float | None = None


class Files(argparse.Action):
    """Take one file or several, as often as the flag is given: one as a text, several as a list.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--data", nargs="+", action=Files)
    >>> parser.parse_args(["--data", "a"]).data, parser.parse_args("--data a=2 b=1 --data c=1".split()).data
    ('a', ['a=2', 'b=1', 'c=1'])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.given: list[str] = []
        self.to: argparse.Namespace | None = None

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Take those of one flag."""
        if self.to is not namespace:  # another command line
            self.given, self.to = [], namespace
        self.given += values
        setattr(namespace, self.dest, self.given[0] if len(self.given) == 1 else list(self.given))


def sources_of(data: Data) -> list[Source]:
    """Return the files that are named, none for no file.

    Raises:
      ValueError: some have a weight and some have none, a weight is not above 0, or a file is named twice.

    >>> sources_of(["a.jsonl=0.7", "b.jsonl=0.3"])
    [Source(path='a.jsonl', weight=0.7), Source(path='b.jsonl', weight=0.3)]
    """
    texts = [] if data is None else [data] if isinstance(data, str) else list(data)
    found = [_source(text) for text in texts]
    weighted = [source for source in found if source.weight is not None]
    if weighted and len(weighted) < len(found):
        bare = next(source.path for source in found if source.weight is None)
        raise ValueError(f"--data {bare} has no weight, and others have: give all one, such as {bare}=0.5, or none")
    for source in found:
        if [other.path for other in found].count(source.path) > 1:
            raise ValueError(f"--data names {source.path} twice: name it once, with a weight if it is to count more")
    return found


def rewritten(data: Data, change: Any) -> Data:
    """Return the same with other paths, by a function of the path."""
    if data is None:
        return None
    texts = [_text(Source(change(source.path), source.weight)) for source in sources_of(data)]
    return texts[0] if isinstance(data, str) else texts


def shown_data(data: Data) -> str:
    """Name the files, or what is learnt from where there is none.

    >>> shown_data(None), shown_data("a.jsonl"), shown_data(["a=1", "b=2"])
    ('the docstrings of Python', 'a.jsonl', 'a=1 b=2')
    """
    return "the docstrings of Python" if data is None else data if isinstance(data, str) else " ".join(data)


def columns_of(text: str | None) -> dict[str, str]:
    """Read what the keys of a form are called in a file, KEY=COLUMN with commas between.

    Raises:
      ValueError: it is not of that form, or names a key that no form has.

    >>> columns_of("prompt=question, completion=the answer")
    {'prompt': 'question', 'completion': 'the answer'}
    """
    from rslora_jax.train.forms import FORMS, FORMS_HELP, KEYS

    found: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        key, equals, column = (one.strip() for one in part.partition("="))
        if not (key and equals and column):
            raise ValueError(
                f"--columns {text} is not of the form KEY=COLUMN, such as prompt=question,completion=answer"
            )
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ValueError(
                f"--columns has {key}, which is a key of no form; "
                + (f"did you mean {near[0]}?" if near else FORMS_HELP)
            )
        if key in found:
            raise ValueError(f"--columns has {key} twice: name one column for it")
        found[key] = column
    if found and not any(found.keys() >= set(form.needed) for form in FORMS):
        raise ValueError(f"--columns {text} names not all keys of a form: give those of one of {FORMS_HELP}")
    return found


def _source(text: str) -> Source:
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Source(text)
    try:
        return Source(path, Number(float, above=0)(weight))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--data {text}: {error}, the weight of {path}") from error


def _text(source: Source) -> str:
    return source.path if source.weight is None else f"{source.path}={source.weight!r}"
