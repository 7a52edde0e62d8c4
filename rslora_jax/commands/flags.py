"""How the commands' flags are declared and checked, and those that several commands have."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# `shared` adds them by name; what a command means otherwise, it says there.
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "folder": {"text": "of a run, of one of its checkpoints, or of PEFT", "metavar": "FOLDER"},
    "--model": {"text": "the base, where it is not where the run found it", "metavar": "MODEL"},
    "--step": {"text": "which checkpoint (default: the last)", "metavar": "last|best|N"},
    "--dtype": {
        "text": "dtype to compute in (default: the run's, or float32)",
        "choices": ("float32", "bfloat16"),
    },
    "--param-dtype": {
        "default": "float32",
        "text": "dtype to hold the base in",
        "choices": ("float32", "bfloat16"),
    },
    "--data": {
        "text": "a file or folder of examples, as in training (default: docstrings of Python)",
        "metavar": "FILE",
    },
    "--columns": {
        "text": "what the keys of the examples are called in the files, such as prompt=question,completion=answer",
        "metavar": "KEY=COLUMN",
    },
    "--max-len": {
        "default": 256,
        "text": "tokens in a row; longer examples are cut, longer text is split",
        "metavar": "N",
        "least": 2,
    },
    "--template-option": {
        "default": [],
        "text": "a value that the chat template looks at, such as enable_thinking=false; as often as you like",
        "metavar": "NAME=VALUE",
        "action": "append",
    },
    "--heldout": {"text": "at most so many held-out examples", "metavar": "N", "least": 1},
    "--batch-size": {"default": 8, "text": "rows or prompts that are taken together", "metavar": "N", "least": 1},
    "--max-new": {"default": 256, "text": "most tokens of an answer", "metavar": "N", "least": 1},
    "--out": {"text": "new folder to write", "metavar": "FOLDER"},
}


_MOST = {int: 2**31 - 1, float: math.inf}


@dataclasses.dataclass(frozen=True)
class Number:
    """Read a number of a range, for a flag or a file of settings; what is none is an argparse.ArgumentTypeError.

    Attributes:
      kind: int or float.
      least: the smallest that is taken.
      above, below: what it is to be greater and smaller than.
      most: the largest that is taken.
      word: what is taken in place of a number.

    >>> Number(int, least=1)("3"), Number(float, least=0, below=1)("0.5")
    (3, 0.5)
    >>> Number(float, above=0)("nan")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: nan is not a number above 0
    """

    kind: type
    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    most: float = math.inf
    word: str | None = None

    def __call__(self, text: str) -> Any:
        """Return the number that a text is, or the word."""
        if text == self.word:
            return text
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        most = min(self.most, _MOST[self.kind])
        if self.above < value < self.below and self.least <= value <= most:  # of an infinite one neither holds
            return value
        bounds = [("of at least", self.least), ("above", self.above), ("below", self.below), ("of at most", self.most)]
        wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        wanted += f", or {self.word}" if self.word else ""
        raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' if self.kind is int else ''}number {wanted}")


class Several(argparse.Action):
    """Take patterns with commas between them, as often as the flag is given; they take the place of its default.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--targets", default="all-linear", action=Several)
    >>> parser.parse_args("--targets q_proj,v_proj --targets */{o,up}_proj/*".split()).targets
    ['q_proj', 'v_proj', '*/{o,up}_proj/*']
    >>> parser.parse_args(["--targets", "*/q/*"]).targets
    '*/q/*'
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.given: list[str] = []
        self.to: argparse.Namespace | None = None

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Take those of one flag."""
        if self.to is not namespace:  # another command line
            self.given, self.to = [], namespace
        parts = (part.strip() for part in re.split(r",(?![^{]*\})", values))
        self.given += [part for part in parts if part]
        one = self.given[0] if len(self.given) == 1 and isinstance(self.default, str) else list(self.given)
        setattr(namespace, self.dest, one)


def add_flag(group: Any, flag: str, default: Any, text: str, **options: Any) -> None:
    """Add a flag of the kind of its default, which its help text shows.

    A flag that is a number says in which range it is: by `least`, `above`, `below` or `most` (`Number`).

    >>> parser = argparse.ArgumentParser(prog="p", add_help=False)
    >>> add_flag(parser, "--rank", 32, "rank of every adapter", metavar="R", least=1)
    >>> parser.parse_args(["--rank", "8"]).rank, parser.format_help().splitlines()[-1].strip()
    (8, '--rank R  rank of every adapter (default 32)')
    """
    shows = isinstance(default, (str, int, float))
    kind = {"type": options.pop("type", type(default))} if shows or "type" in options else {}
    if bounds := {name: options.pop(name) for name in ("least", "above", "below", "most") if name in options}:
        kind = {"type": Number(kind["type"], **bounds)}
    group.add_argument(flag, default=default, help=text + (f" (default {default})" if shows else ""), **kind | options)


def pairs(flag: str, texts: Sequence[str], number: Number) -> list[tuple[str, Any]]:
    """Read what a flag gives as GLOB=NUMBER, as often as it is given.

    Raises:
      ValueError: one is not of that form, or no number of that range.

    >>> pairs("--rank-pattern", ["*/mlp/*=8", "w=4"], Number(int, least=1))
    [('*/mlp/*', 8), ('w', 4)]
    """

    def pair(text: str) -> tuple[str, Any]:
        pattern, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError(f"{flag} {text} has no number: write it as {flag} '{text}=8'")
        try:
            return pattern, number(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{flag} {text}: {error}") from error

    return [pair(text) for text in texts]


def shared(group: Any, flag: str, **changes: Any) -> None:
    """Add a flag that several commands have, with what this command changes of it: `default`, `text` and others.

    >>> parser = argparse.ArgumentParser()
    >>> shared(parser, "--batch-size", default=2)
    >>> parser.parse_args([]).batch_size
    2
    """
    add_flag(group, flag, **{"default": None, **_SHARED[flag], **changes})


def check_new_file(flag: str, path: str | None) -> None:
    """Raise a ValueError where a file that a flag names cannot be written."""
    from rslora_jax.store.folder import check_writable

    if not path:
        return
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{Path(path).parent} is no folder: make it before {flag} {path}")
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder: give a file")
    check_writable(Path(path).absolute().parent, path)
