"""Write a folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which takes its name at the end; on an error nothing is left.

    Raises:
      ValueError: `folder` is a file or holds something, or no folder can be made beside it.

    >>> with tempfile.TemporaryDirectory() as place:
    ...     with written_whole(Path(place) / "out") as out:
    ...         _ = (out / "a.txt").write_text("all of it")
    ...     sorted(path.name for path in Path(place).rglob("*"))
    ['a.txt', 'out']
    """
    folder = Path(folder).absolute()
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        yield made
        check_free(folder)  # again: another process may have been quicker
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)  # mkdtemp's is for the owner alone
        try:
            made.replace(folder)
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_free(folder: str | Path) -> None:
    """Raise a ValueError where a folder is a file or holds something."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give another folder")
