"""A run's folder: the checkpoints that it holds, and whether it is free."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_folder(folder: str | Path, *, resume: bool = False) -> None:
    """Raise a ValueError where `open_checkpoints` would for what a folder holds."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    steps = steps_in(folder)
    if resume and not steps:
        raise ValueError(f"{folder} holds no checkpoint to resume from: start a run there first")
    if steps and not resume:
        raise ValueError(f"{folder} already holds a run, at step {steps[-1]}: resume it, or give another folder")


def check_writable(folder: str | Path, what: str | Path | None = None) -> None:
    """Raise a ValueError where nothing can be written in a folder, or where it would have to be made.

    Args:
      folder: the folder; nothing stays of what is tried in it.
      what: what the error names; by default the folder.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        # The rights alone do not tell: the disk may be full or read-only, and root may all.
        with tempfile.NamedTemporaryFile(prefix=".rslora-", dir=place) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise ValueError(f"{what or folder} cannot be written: {(error.strerror or str(error)).lower()}") from error


def steps_in(folder: Path) -> list[int]:
    """Return the finished checkpoints of a run's folder, by step.

    Raises:
      ValueError: there is a folder, and it cannot be read.
    """
    try:
        found = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit() and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{folder / 'checkpoints'} cannot be read ({reason}): it is left as it is") from error
    return sorted(int(path.name) for path in found)


def size_of(folder: str | Path) -> int:
    """Return the bytes that the files under a folder take."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it even after a crash."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock is better than a lock that a crash leaves behind
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run: wait for it to end, or give another folder") from None
        yield
