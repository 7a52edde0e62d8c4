"""Ask a process with limits."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

_FOLDER = Path(__file__).parent
SECONDS = 3.0
_MEMORY = 400_000_000  # beside what the interpreter takes
_MOST = 64_000_000  # the parent holds an answer twice for a moment


class Exceeded(ValueError):
    """What was asked takes more than its limit; the text says which, as in "takes more than 3 s of computing"."""


class _Plain(pickle.Unpickler):
    """Read plain values, and nothing that would import or call."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")


class Confined:
    """A process that answers with a program of this folder, for as long as it keeps within its limits.

    Args:
      program: the name of a file of this folder, which has `answer(question)`.
      seconds: of computing, for one question; by default `SECONDS`.
      memory: bytes that the process may take beside what it starts with, on Linux.
      most: bytes of an answer.

    Use it by one thread at a time. After an error it is closed.

    >>> with contextlib.closing(Confined("patterns")) as patterns:
    ...     patterns.ask(("fullmatch", (".*[qv]_proj",), ["a.q_proj", "a.k_proj"]))
    [(0, None), None]
    """

    def __init__(self, program: str, *, seconds: float | None = None, memory: int = _MEMORY, most: int = _MOST):
        seconds, self._most = seconds or SECONDS, most
        self._limits = {"time": f"{seconds:g} s of computing", "memory": f"{memory / 1e6:.0f} MB of memory"}
        # -I -S: nothing of the user's is run at its start, and where to import from it is told.
        command = [sys.executable, "-I", "-S", str(_FOLDER / "child.py")]
        # Arenas of threads, and pools, reserve more than they use, which counts.
        env = {
            **os.environ,
            "MALLOC_ARENA_MAX": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "OPENBLAS_NUM_THREADS": "1",
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=env, **pipes)
        self._send(pickle.dumps((sys.path, str(_FOLDER / f"{program}.py"), seconds, memory, most)))

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def ask(self, question: Any) -> Any:
        """Send a question and return its answer, plain values both.

        Raises:
          Exceeded: it takes more time, memory or depth than there is.
          ImportError: the program needs a package that is not installed.
          ValueError: the program refused the question, or it cannot be sent.
        """
        try:
            text = pickle.dumps(question)
        except Exception as error:  # each kind of object refuses in its own way
            raise ValueError(f"what is given cannot be sent to another process ({error})") from error
        try:
            self._send(text)
            kind, value = self._answer()
        except BaseException:  # an interrupt leaves an answer on its way
            self.close()
            raise
        if kind == "answer":
            return value
        if kind == "missing":
            raise ImportError(value)
        if kind == "refused":
            raise ValueError(value)
        if value == "depth":
            raise Exceeded("goes deeper than calls may go")
        raise Exceeded(f"takes {'more than ' + self._limits['memory'] if value == 'memory' else value}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()

    def _send(self, text: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except OSError:
            self._ended()

    def _answer(self) -> Any:
        assert self._process.stdout
        head = self._process.stdout.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = self._process.stdout.read(size) if size <= self._most else b""
        if not text or len(text) < size:
            self._ended()
        try:
            return _Plain(io.BytesIO(text)).load()
        except Exception as error:  # of pickles that nobody wrote
            raise ValueError(f"answers with what is no plain value ({error})") from error

    def _ended(self) -> NoReturn:
        """Say why the process came to an end before its answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        by = -(self._process.returncode or 0)
        if by == getattr(signal, "SIGPROF", None):
            raise Exceeded(f"takes more than {self._limits['time']}")
        raise Exceeded(f"ends the process that runs it (status {-by}), as what takes too much memory or depth does")


_warm: dict[str, Confined] = {}
_lock = threading.Lock()


def ask(program: str, question: Any) -> Any:
    """Ask a program's process that all threads share, which stays for the next question; errors as of `Confined.ask`.

    >>> ask("patterns", ("match", ("(a+)+",), ["aa", "b"]))
    [(0, None), None]
    """
    with _lock:
        if program not in _warm:
            _warm[program] = Confined(program)
        try:
            return _warm[program].ask(question)
        except BaseException as error:
            if isinstance(error, Exceeded) or not isinstance(error, Exception):
                _warm.pop(program).close()
            raise


def close_all() -> None:
    """End the processes that are kept; the next question starts new ones."""
    while _warm:
        _warm.popitem()[1].close()


def _forget() -> None:
    """In the child of a fork, leave the parent's processes to it."""
    global _lock
    _lock = threading.Lock()
    _warm.clear()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
