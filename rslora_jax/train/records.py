"""The records of a file, one JSON object a line, and the examples that they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from rslora_jax.shown import shown
from rslora_jax.train.examples import Example
from rslora_jax.train.forms import FORMS_HELP, parse, renamed
from rslora_jax.train.unpacked import lines

_BAD_ROWS_SHOWN = 3
_LONGEST_LINE = 1 << 25  # bytes: an object takes many times those of its JSON
_LONGEST = 220  # characters of what is said of them, without the file's name


def read_jsonl(path: str | PathLike[str]) -> list[Example]:
    """Read a file of one JSON object a line, each in one of the forms that `forms.parse` lists.

    The file is UTF-8. Blank lines are skipped; every other line becomes an example, in order. Keys of no
    form (an id, a source) are left alone; those of two forms leave open which is meant, and are an error.

    Raises:
      ValueError: the file cannot be read, holds no example, or has bad lines. All lines are checked
        first; the message counts the bad ones and says for the first few, by file:line, what is wrong.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "sums.jsonl")
    >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
    >>> read_jsonl(path)[0].completion
    ' 4'
    """
    return parse_all(path, lines_of(Path(path)), decode_line, kind="line")


def parse_all(
    path: str | PathLike[str],
    rows: Iterable[tuple[int, Any]],
    decode: Callable[[Any], dict[str, Any]],
    *,
    kind: str,
    columns: Mapping[str, str] | None = None,
    skipped: list[str] | None = None,
) -> list[Example]:
    """Make an example of each numbered row of a file, where `decode` turns a row into an object of one form.

    Args:
      path: the file, for messages.
      rows: its rows.
      decode: makes an object of a row, or raises a ValueError.
      kind: what the file's rows are called.
      columns: what the keys of the form are called there (`forms.renamed`).
      skipped: where it is given, bad rows are left out, and told in it, one text each.

    Raises:
      ValueError: there are no rows, or bad ones; as `read_jsonl` says.

    >>> parse_all("sums", [(1, '2 + 2'), (2, '3 + 3')], lambda row: {"text": row}, kind="line")[1].origin
    'sums:2'
    """
    examples: list[Example] = []
    problems, count = list[str](), 0
    for number, row in rows:
        origin = f"{path}:{number}"
        try:
            examples.append(parse(renamed(decode(row), columns or {}), origin))
        except ValueError as error:
            if skipped is not None:
                skipped.append(f"{origin} {error}")
                continue
            count += 1
            # Of the first all is said; of the others only what is wrong.
            text = f"{origin} {error}" if count == 1 else f"{kind} {number} {str(error).partition(';')[0]}"
            length = sum(map(len, (*problems, text))) - len(str(path))
            if count <= _BAD_ROWS_SHOWN and (count == 1 or length <= _LONGEST):
                problems.append(text)
    if count == 1:
        raise ValueError(problems[0])
    if count:
        more = f"; and {count - len(problems)} more" if count > len(problems) else ""
        raise ValueError(f"{count} bad {kind}s: {'; '.join(problems)}{more}")
    if not examples:
        what = "JSON object a line" if kind == "line" else f"example {'an' if kind == 'object' else 'a'} {kind}"
        none = "no examples" if not skipped else f"no good examples, {skipped[0]}"
        raise ValueError(f"{path} holds {none}; write one {what}, as {FORMS_HELP}")
    return examples


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Give the lines of a file that are not blank, with their numbers.

    Raises:
      ValueError: the file cannot be read.
    """
    # Bytes, so that one line of bad UTF-8 is one bad line, and U+2028 inside a string ends no line.
    for number, line in lines(path, "JSON lines", _LONGEST_LINE):
        if line := line.rstrip():
            yield number, line


def decode_line(line: bytes) -> dict[str, Any]:
    """Read one line of JSON as an object; a ValueError says what it is in place of one.

    >>> decode_line(b'{"text": "a", "text": "b"}')
    Traceback (most recent call last):
    ValueError: has the key "text" twice; keep one of them
    """
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"is longer than {_LONGEST_LINE} bytes; write what it holds as several lines")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    try:
        record = json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.lower()} at column {error.colno}"
        raise ValueError(f"is not JSON ({reason}); write one whole JSON object on each line") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply; write one flat JSON object on each line") from error
    return an_object(record)


def an_object(value: Any) -> dict[str, Any]:
    """Return a JSON value that is an object; a ValueError says what it is in place of one."""
    if not isinstance(value, dict):
        kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
        raise ValueError(f"is {kinds.get(type(value), 'a list')}, not an object; write it as {FORMS_HELP}")
    return value


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, for `object_pairs_hook`; a ValueError names a key that is there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'has the key "{shown(repeated, 40)}" twice; keep one of them')
    return record
