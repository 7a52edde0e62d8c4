"""What a file holds, written so that it fits into a message: printable, on one line, and not long."""

from __future__ import annotations

import json
import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlong = 60, 60, 40


def shown(text: str, most: int = 80) -> str:
    """Write a name or a text from a file.

    >>> shown("a" * 200) == "a" * 77 + "...", shown("w\\x1b[2J")
    (True, 'w\\\\x1b[2J')
    """
    start = text[: most + 1]
    start = start if start.isprintable() else ascii(start)[1:-1]
    return start if len(start) <= most and len(text) <= most else start[: most - 3] + "..."


def quoted(value: Any, most: int = 80) -> str:
    """Write a value from a file as Python would, without what makes it long.

    >>> quoted([1.5, "a"]), quoted(10**400), quoted({"a": [[[[[[[1]]]]]]]})
    ("[1.5, 'a']", '100000000000000000...0000000000000000000', "{'a': [[[[[...]]]]]}")
    """
    try:
        return shown(_REPR.repr(value), most)
    except ValueError:  # a number of more digits than Python writes out
        return f"a {type(value).__name__} too long to show"


def in_json(value: Any, most: int = 80) -> str:
    """Write a value from a JSON file as it stands there, or as Python would where that cannot be.

    >>> in_json({"use_dora": True, "r": None})
    '{"use_dora": true, "r": null}'
    """
    try:
        return shown(json.dumps(value), most)
    except (ValueError, RecursionError):
        return quoted(value, most)


def reason_of(error: BaseException, most: int = 120) -> str:
    """Write what an error says, or what it is where it says nothing.

    >>> reason_of(ValueError("one\\n  two")), reason_of(KeyError())
    ('one two', 'KeyError')
    """
    return shown(" ".join(str(error)[: 4 * most].split()), most) or type(error).__name__
