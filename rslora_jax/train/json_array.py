"""The objects of a file that is one JSON array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rslora_jax.train.records import without_repeats
from rslora_jax.train.unpacked import content, lines, text_of

_SPACE = re.compile(r"[ \t\r\n]*")


def is_array(path: Path) -> bool:
    """Say whether a file begins as a JSON array does.

    Raises:
      ValueError: it cannot be read.
    """
    for _, line in lines(path, "JSON", 64):
        if line.strip():
            return line.lstrip().startswith(b"[")
    return False


def array_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Give the values of the array, each with the number of the line that it begins in; of one line, its own number.

    Raises:
      ValueError: the file cannot be read or is not one whole JSON array.
    """
    text = text_of(content(path, "JSON"), path)
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    at = _after_space(text, _after_space(text, 0) + 1)  # behind the bracket
    number, counted, count, is_line = 1, 0, 0, "\n" not in text.strip()
    while text[at : at + 1] != "]":
        number, counted = number + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError as error:
            raise ValueError(f"{path}:{number} is nested too deeply; write flat JSON objects") from error
        except json.JSONDecodeError as error:
            reason = f"{error.msg.lower()} at column {error.colno}"
            raise ValueError(f"{path}:{error.lineno} is not JSON ({reason}); write one whole JSON array") from error
        except ValueError as error:  # of a key that is there twice
            raise ValueError(f"{path}:{number} {error}") from error
        count += 1
        yield count if is_line else number, value
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            number += text.count("\n", counted, at)
            raise ValueError(f"{path}:{number} has no comma after an object, or no ] at its end; write one whole array")
    if text[at + 1 :].strip():
        raise ValueError(f"{path} goes on behind its array; write one array, or one JSON object a line")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
