"""What several processes of one run agree on (`jax.distributed.initialize`); with one process, all of it is plain."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_LONGEST = 2000  # bytes of an error's text that travel


def is_first() -> bool:
    """Say whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def first_decides(check: Callable[[], Any]) -> None:
    """Run a check in the first process; where it raises a ValueError, every process raises it.

    >>> first_decides(lambda: None)
    """
    if jax.process_count() == 1:
        check()
        return
    from jax.experimental import multihost_utils

    text = b""
    if is_first():
        try:
            check()
        except ValueError as error:
            text = str(error).encode()[:_LONGEST] or b"?"
    letters = np.zeros(_LONGEST, np.uint8)
    letters[: len(text)] = np.frombuffer(text, np.uint8)
    said = bytes(np.asarray(multihost_utils.broadcast_one_to_all(letters))).rstrip(b"\0")
    if said:
        raise ValueError(said.decode(errors="replace"))


@contextlib.contextmanager
def stop_requests(said: str = "") -> Iterator[Callable[[int], int | None]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second acts as it always does.

    At the first Ctrl-C `said` is written to the standard error at once, however long what is under way takes.

    Gives `asked(step)`: the signal that came, or None, the same in every process that asks for the same step. Of
    several processes, one signalled is enough: JAX's pre-emption service finds a step that all can stop at.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None  # only the main thread may have handlers
        return
    if jax.process_count() > 1:
        with _across_processes() as asked:
            yield asked
        return
    came: list[int] = []
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def take(kind: int, frame: Any) -> None:
        came.append(kind)
        signal.signal(kind, before[signal.Signals(kind)])
        if said and kind == signal.SIGINT:  # a handler may strike within a print, so it does not print itself
            line = "\n" if os.isatty(2) else ""  # there ^C stands in the line
            os.write(2, f"{line}{said}\n".encode())

    for kind in before:
        signal.signal(kind, take)
    try:
        yield lambda step: came[0] if came else None
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _across_processes() -> Iterator[Callable[[int], int | None]]:
    from jax.experimental import multihost_utils

    # The service listens to SIGTERM alone.
    before = signal.signal(signal.SIGINT, lambda kind, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
    finally:
        signal.signal(signal.SIGINT, before)
