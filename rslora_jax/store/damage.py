"""What is damage to a checkpoint, and what only says that it cannot be read just now."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rslora_jax.shown import reason_of

# What the system and tensorstore say where not the file is at fault, but the right to read it, memory or a device.
_NO_DAMAGE = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|"
    "permission denied|too many open files|input/output error|out of memory|cannot allocate",
    re.IGNORECASE,
)


class Damaged(ValueError):
    """A checkpoint does not hold what was saved."""


def read_or_say(where: Path, read: Callable[[], Any]) -> Any:
    """Return what `read()` gives.

    Raises:
      Damaged: it raised what a file that is missing, cut or changed makes it raise.
      ValueError: it raised for another reason, such as that the file may not be read: no damage is shown.
    """
    try:
        return read()
    except Exception as error:  # orbax lets through what tensorstore, json and the system raise
        if _is_damage(error):
            raise Damaged(f"{where} is damaged ({reason_of(error)})") from error
        raise ValueError(f"{where} cannot be read ({reason_of(error)}): it is left as it is") from error


def _is_damage(error: BaseException) -> bool:
    """Say whether an error of reading is the file's fault.

    >>> _is_damage(FileNotFoundError(2, "no such file")), _is_damage(PermissionError(13, "Permission denied"))
    (True, False)
    """
    gone = FileNotFoundError | NotADirectoryError | IsADirectoryError
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and not isinstance(error, gone) and error.errno):
        return False
    before = error.__cause__ or error.__context__
    return not _NO_DAMAGE.search(str(error)) and (before is None or _is_damage(before))
