"""The rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rslora_jax.shown import reason_of, shown
from rslora_jax.train.forms import FORMS_HELP
from rslora_jax.train.unpacked import lines, text_of

_LONGEST_CELL = 1 << 25


class Row(NamedTuple):
    """Hold the cells of a row, and the names of the columns."""

    names: tuple[str, ...]
    cells: tuple[str, ...]


def csv_rows(path: Path, wanted: Sequence[str], delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    """Give the rows of a CSV file (RFC 4180) below its header, each with the number of the line that it begins in.

    Where no column is one of those that are `wanted`, semicolons and tabs are tried in place of the delimiter: that is
    what spreadsheets write where the comma is in numbers.

    Raises:
      ValueError: the file cannot be read, is no CSV, or has none of the columns.
    """
    # The module's limit of a cell is 128 KB, and for the whole process.
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        for tried in dict.fromkeys((delimiter, ";", "\t")):
            rows = _rows(path, tried)
            first, header = next(rows, (1, ()))
            names = tuple(name.strip() for name in header)
            if not names:
                return  # an empty file
            if found := [name for name in names if name in wanted]:
                break
        else:
            _, header = next(_rows(path, delimiter))
            listed = ", ".join(f'"{name.strip()}"' for name in header[:20])
            raise ValueError(f"{path}:{first} has the columns {shown(listed, 120)}; name them as {FORMS_HELP}")
        for name in found:
            if found.count(name) > 1:
                raise ValueError(f'{path}:{first} has the column "{name}" twice; keep one of them')
        yield from ((number, Row(names, cells)) for number, cells in rows)
    finally:
        csv.field_size_limit(before)


def decode_row(row: Row) -> dict[str, Any]:
    """Make an object of a row; an empty cell is a key that is not there.

    >>> decode_row(Row(("prompt", "completion", "id"), ("2 + 2 =", "4", "")))
    {'prompt': '2 + 2 =', 'completion': '4'}
    """
    if len(row.cells) != len(row.names):
        raise ValueError(f"has {len(row.cells)} cells for {len(row.names)} columns; put text with commas in quotes")
    return {name: cell for name, cell in zip(row.names, row.cells, strict=True) if cell}


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Give the rows that are not blank; a quoted cell may hold line ends, so a row may have several lines."""
    texts = (text_of(line, path, number) for number, line in lines(path, "CSV", _LONGEST_CELL))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    number = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}:{number} is not CSV ({reason_of(error)}); put text with commas, quotes or line ends in quotes"
            ) from error
        if any(cells):
            yield number, tuple(cells)
        number = reader.line_num + 1
