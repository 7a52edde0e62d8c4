"""Files of data as bytes, unpacked where they are compressed by gzip."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rslora_jax.shown import reason_of

# A file may unpack to any size: how many bytes are taken, beside so many times its own.
_MOST, _TIMES = 500_000_000, 100
_AT_ONCE = 1 << 20


@contextlib.contextmanager
def opened(path: Path, kind: str, at: Callable[[], str] = str) -> Iterator[Any]:
    """Open a file, or what a file that ends in .gz holds, and say of either in a sentence why it cannot be read.

    Args:
      path: the file.
      kind: what it is to be, for messages.
      at: says in which line, as ":7", where that is known.

    Raises:
      ValueError: it cannot be opened or read, or it is no gzip file, or a damaged one.
    """
    try:
        with path.open("rb") as raw:
            yield gzip.GzipFile(fileobj=raw) if is_packed(path) else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = reason_of(error).rstrip(".")
        raise ValueError(f"{path}{at()} is cut off, damaged or not gzip ({why}); compress it anew") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{path} cannot be read ({reason}); give the path of a {kind} file") from error


def is_packed(path: Path) -> bool:
    """Say whether a file is compressed by gzip, by its name."""
    return path.suffix.lower() == ".gz"


def lines(path: Path, kind: str, longest: int) -> Iterator[tuple[int, bytes]]:
    """Give the lines of a file with their numbers, from 1; of one above `longest` bytes only one byte more than that.

    Raises:
      ValueError: the file cannot be read, or unpacks to more than a file may.
    """
    number = 0
    with opened(path, kind, lambda: f":{number + 1}") as file:
        most = _most(path)
        while line := file.readline(longest + 1):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(_AT_ONCE)):
                _check(path, number, file, most)
            _check(path, number, file, most)
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def content(path: Path, kind: str) -> bytes:
    """Return all of a file, without a byte order mark.

    Raises:
      ValueError: as `lines`.
    """
    with opened(path, kind) as file:
        most = _most(path)
        whole = file.read(most + 1) if is_packed(path) else file.read()
        _check(path, 1, file, most)
    return whole.removeprefix(b"\xef\xbb\xbf")


@contextlib.contextmanager
def unpacked_file(path: Path, kind: str) -> Iterator[Path]:
    """Give a file that holds what a packed one does, for as long as it is needed; one that is not packed, itself.

    Raises:
      ValueError: as `lines`.
    """
    if not is_packed(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, path.stem)
        with opened(path, kind) as file, unpacked.open("wb") as out:
            shutil.copyfileobj(_Bounded(path, file), out)
        yield unpacked


class _Bounded:
    """A packed file that is read up to as much as it may unpack to."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file, self.most = path, file, _most(path)

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(size)
        _check(self.path, 1, self.file, self.most)
        return found


def _most(path: Path) -> int:
    return _MOST + _TIMES * path.stat().st_size if is_packed(path) else 0


def _check(path: Path, number: int, file: IO[bytes], most: int) -> None:
    if most and file.tell() > most:
        raise ValueError(
            f"{path}:{number} unpacks to more than {most / 1e6:.0f} MB, {_TIMES} times its size; unpack it yourself if "
            "that is meant"
        )


def text_of(data: bytes, path: Path, first: int = 1) -> str:
    """Decode UTF-8; a ValueError says at which line it is none, where `first` is the number of the first."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first + error.object[: error.start].count(b"\n")
        raise ValueError(f"{path}:{line} is not UTF-8; save the file as UTF-8") from error
