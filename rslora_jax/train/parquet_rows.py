"""The rows of a Parquet file, read in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.confined import Confined, Exceeded
from rslora_jax.shown import reason_of, shown
from rslora_jax.train.forms import FORMS_HELP

# A file may unpack to any size: how long one batch of rows may take, the bytes of all rows and of one batch.
_SECONDS, _KEPT, _AT_ONCE = 5.0, 500_000_000, 256_000_000


def check_pyarrow(path: Path) -> None:
    """Raise a ValueError where what reads Parquet files is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise _without_pyarrow(path)


def parquet_rows(file: Path, path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the rows of a file with the columns that are wanted; `path` is what messages call it.

    Raises:
      ValueError: the file cannot be read, is damaged, or has none of the columns.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    reader = Confined("parquet", seconds=_SECONDS, memory=_KEPT + 4 * size, most=_AT_ONCE)
    with contextlib.closing(reader):
        names = _asked(reader, path, (str(file), wanted))
        columns = [name for name in names if name in wanted]
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


def _asked(reader: Confined, path: Path, question: Any, first: int = 1) -> Any:
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


def _without_pyarrow(path: Path) -> ValueError:
    return ValueError(f"{path} needs pyarrow to be read: pip install pyarrow")


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read ({reason.lower()}); give the path of a Parquet file")
