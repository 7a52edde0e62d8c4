"""The rows of a Parquet file, a few at a time: how much a small file unpacks to, it alone knows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1024, 16_000_000
_ROW = 800  # bytes that an example takes beside its text
_open: dict[str, Iterator[pyarrow.RecordBatch]] = {}


def answer(question: tuple[str, Sequence[str]] | None) -> Any:
    """Open a file, given its path and the columns to read of it, and return all its columns; or give its next rows.

    Returns:
      Of a file its columns' names; then with each question (rows, bytes that they take as objects), and None at its
      end. Where it cannot be read, (kind, reason) in place of that: "unreadable", "damaged", or "not UTF-8" with how
      many rows after the first it may be.
    """
    try:
        return _names(*question) if question else _next()
    except MemoryError:  # before ArrowException: some are both
        raise
    except OSError as error:
        return "unreadable", error.strerror or str(error)
    except pyarrow.ArrowException as error:
        return "damaged", str(error)


def _names(path: str, wanted: Sequence[str]) -> list[str]:
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    about = file.metadata
    size = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
    at_once = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * about.num_rows // max(size, 1)))
    columns = [name for name in names if name in wanted]
    _open["batches"] = file.iter_batches(at_once, columns=columns, use_threads=False)
    return names


def _next() -> Any:
    batch = next(_open["batches"], None)
    if batch is None:
        return None
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        return "not UTF-8", str(batch.num_rows - 1)
    return [_plain(row) for row in rows], sum(map(_size, rows)) + _ROW * len(rows)


def _plain(value: Any) -> Any:
    """Give a value of JSON's kinds: of what is of no such kind, such as a date, an empty object."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, bytes, bool, int, float)) else {}


def _size(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sys.getsizeof(value) + sum(map(_size, inner))
