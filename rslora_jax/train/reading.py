"""The user's own data, read by the kind of file."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from rslora_jax.confined import Confined, Exceeded
from rslora_jax.shown import reason_of, shown
from rslora_jax.train.examples import Example
from rslora_jax.train.forms import FORMS_HELP, KEYS
from rslora_jax.train.records import parse_all, read_jsonl

# A file may unpack to any size: how long one batch of rows may take, the bytes of all rows and of one batch.
_SECONDS, _KEPT, _AT_ONCE = 5.0, 500_000_000, 256_000_000


def read_examples(path: str | PathLike[str]) -> list[Example]:
    """Read a data file; its suffix says how.

    - `.jsonl`, `.json`: one JSON object a line, as `read_jsonl` says.
    - `.parquet`: the same forms, with columns for keys; needs pyarrow. A null is a key that is not there, so
      one file may hold several forms. Other columns are not read.
    - `.txt`, `.md`: one document, all of which is learnt, just as it stands: blank lines, indents and line ends
      are kept. `prepare` splits what is longer than a row, so nothing is lost. For many documents in one
      file, write `{"text": ...}` lines.

    Raises:
      ValueError: the suffix is none of these, the file cannot be read or holds no example, or rows are bad:
        the message names the file and the first bad rows, counted from 1.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "rhyme.txt")
    >>> _ = path.write_text("One, two.\\n\\nBuckle my shoe.\\n")
    >>> [example.completion for example in read_examples(path)]
    ['One, two.\\n\\nBuckle my shoe.\\n']
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".json"):
        return read_jsonl(path)
    if suffix in (".txt", ".md"):
        return [_read_text(path)]
    if suffix == ".parquet":
        return parse_all(path, _parquet_rows(path), _without_nulls, kind="row")
    raise ValueError(
        f"{path} is of no kind that can be read; give .jsonl or .json (one JSON object a line), .parquet, "
        "or .txt or .md (plain text)"
    )


def _read_text(path: str | PathLike[str]) -> Example:
    try:
        text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{path} cannot be read ({reason}); give the path of a text file") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line} is not UTF-8; save the file as UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text; give a file that does")
    return Example("", text, origin=str(path))


def _parquet_rows(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise _without_pyarrow(path)
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    reader = Confined("parquet", seconds=_SECONDS, memory=_KEPT + 4 * size, most=_AT_ONCE)
    with contextlib.closing(reader):
        names = _asked(reader, path, (str(path), KEYS))
        columns = [name for name in names if name in KEYS]
        if not columns:
            found = ", ".join(f'"{name}"' for name in names[:20]) or "none"
            raise ValueError(f"{path} has the columns {shown(found, 120)}; name them as {FORMS_HELP}")
        for name in columns:
            if columns.count(name) > 1:
                raise ValueError(f'{path} has the column "{name}" twice; keep one of them')
        first, kept, most = 1, 0, _KEPT + 20 * size
        while (found := _asked(reader, path, None, first)) is not None:
            rows, taken = found
            if (kept := kept + taken) > most:
                raise ValueError(
                    f"{path} of {size / 1e6:.1f} MB unpacks to more than {most / 1e6:.0f} MB, from row {first} on; "
                    "write it as JSON lines if that is meant"
                )
            yield from enumerate(rows, start=first)
            first += len(rows)


def _asked(reader: Confined, path: str | PathLike[str], question: Any, first: int = 1) -> Any:
    """Ask the reader of a Parquet file, and raise what it found wrong as a ValueError that names the file."""
    try:
        answer = reader.ask(question)
    except ImportError as error:
        raise _without_pyarrow(path) from error
    except Exceeded as error:
        raise ValueError(f"{path}:{first} {error} to unpack; write it as JSON lines if that is meant") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not Parquet ({reason_of(error)}); write it anew") from error
    kind, text = answer if isinstance(answer, tuple) and isinstance(answer[0], str) else (None, "")
    why = shown(text.partition("\n")[0].replace(str(path), "it"), 120)
    if kind == "not UTF-8":
        raise ValueError(f"{path}:{first} or one of the {why} rows after it is not UTF-8")
    if kind == "damaged":
        raise ValueError(f"{path} is damaged or not Parquet ({why}); write it anew")
    if kind == "unreadable":
        raise _unreadable(path, why)
    return answer


def _without_pyarrow(path: str | PathLike[str]) -> ValueError:
    return ValueError(f"{path} needs pyarrow to be read: pip install pyarrow")


def _unreadable(path: str | PathLike[str], reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read ({reason.lower()}); give the path of a Parquet file")


def _without_nulls(value: Any) -> Any:
    # The columns of a table, and the fields of its structs, are the same in all rows: null says "not here".
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
