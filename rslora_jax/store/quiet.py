"""Silence what tensorstore's threads say of an event loop that orbax has closed."""

from __future__ import annotations

import functools
import sys
from typing import Any


@functools.cache
def quiet_closed_loops() -> None:
    """Pass over "Event loop is closed", raised where nobody can catch it, for the rest of the process.

    Where a save fails, or ends early, orbax closes the loop that waits for tensorstore's writes, and each write that
    ends after that prints a traceback. What failed is an error of the save itself.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook
