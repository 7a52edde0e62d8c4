"""Write a folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rslora_jax.store.folder import check_writable

# In a draft while it is written, and locked by who writes it: a draft with one that nobody holds is left of a process
# that was killed.
_LOCK = ".rslora-draft"


@contextlib.contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which takes its name at the end; on an error nothing is left.

    A process that is killed leaves its temporary folder, which the next one that writes to `folder` removes.

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
        _remove_stale(folder)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    lock = None
    try:
        lock = _locked(made / _LOCK)
        yield made
        check_free(folder)  # again: another process may have been quicker
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)  # mkdtemp's is for the owner alone
        try:
            (made / _LOCK).unlink(missing_ok=True)
            made.replace(folder)
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        if lock is not None:
            lock.close()
        shutil.rmtree(made, ignore_errors=True)


def check_free(folder: str | Path) -> None:
    """Raise a ValueError where a folder is a file, holds something, or cannot be written."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give another folder")
    check_writable(folder.absolute().parent, folder)


def _remove_stale(folder: Path) -> None:
    """Remove the drafts of a folder of which those who wrote them were killed."""
    for draft in folder.parent.glob(f".{_literal(folder.name)}-*"):
        if not (draft / _LOCK).is_file():
            continue
        with contextlib.suppress(OSError):  # it is being written, or is another's
            lock = _locked(draft / _LOCK)
            if lock is not None:
                with lock:
                    shutil.rmtree(draft)


def _literal(name: str) -> str:
    """Write a name as a glob that matches it.

    >>> _literal("a[1]*")
    'a[[]1][*]'
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _locked(path: Path) -> Any:
    """Open a file and lock it; None where the system has no locks that end with their process.

    Raises:
      OSError: another process has it locked.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
