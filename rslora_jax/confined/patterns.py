"""Which of some texts regular expressions match: Python's own, whose matching may take for ever."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence


def answer(question: tuple[str, tuple[str, ...], Sequence[str]]) -> list[tuple[int, str | None] | None]:
    """Return for each text the number of the first pattern that matches it, and the text of its group "number".

    Args:
      question: the name of the function of `re`, the patterns, the texts.

    Raises:
      re.error: a pattern is none.

    >>> answer(("match", ("a", r"b(?P<number>\\d+)"), ["a", "b12", "c"]))
    [(0, None), (1, '12'), None]
    """
    how, patterns, texts = question
    return [_first(_compiled(how, patterns), text) for text in texts]


def _first(matchers: Sequence[Callable[[str], re.Match[str] | None]], text: str) -> tuple[int, str | None] | None:
    for number, matches in enumerate(matchers):
        if found := matches(text):
            return number, found.groupdict().get("number")
    return None


@functools.lru_cache(maxsize=32)  # the patterns of a file are asked for with one text after the other
def _compiled(how: str, patterns: tuple[str, ...]) -> list[Callable[[str], re.Match[str] | None]]:
    return [getattr(re.compile(pattern), how) for pattern in patterns]
