"""The main program of a process with limits: it answers questions from stdin on stdout until stdin ends.

It runs as a script and imports the standard library alone, so that it starts in some hundredths of a second. Questions
are pickles. Answers are pickles of plain values, which the parent reads without running anything of them: what answers
may be in a stranger's hands.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

_LONGEST_REASON = 300


def main() -> None:
    """Read where to import from, the program and its limits; then answer with its `answer(question)`."""
    with contextlib.suppress(AttributeError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not be taken for an answer
    sys.path[:], program, seconds, memory, most = pickle.load(questions)
    answer, kind, value = _load(program)
    _limit_memory(memory)
    while True:
        try:
            question = pickle.load(questions)
        except EOFError:
            return
        if answer is not None:
            _limit_time(seconds)
            kind, value = _tried(answer, question)
            _limit_time(0)
        text = pickle.dumps((kind, value))
        if len(text) > most:
            text = pickle.dumps(("exceeded", f"more than {most / 1e6:.0f} MB of result"))
        answers.write(struct.pack("<Q", len(text)) + text)
        answers.flush()
        kind = value = text = None  # type: ignore[assignment]  # not beside what comes next


def _load(program: str) -> tuple[Callable[[Any], Any] | None, str, str]:
    """Import a program by its file; where that cannot be, say what every answer is."""
    try:
        spec = importlib.util.spec_from_file_location("program", program)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, "missing", str(error)
    return module.answer, "", ""


def _tried(answer: Callable[[Any], Any], question: Any) -> tuple[str, Any]:
    """Answer a question, or say of which kind its failure is."""
    try:
        return "answer", answer(question)
    except MemoryError:
        return "exceeded", "memory"
    except RecursionError:
        return "exceeded", "depth"
    except Exception as error:  # whatever a stranger's program raises
        return "refused", " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def _limit_time(seconds: float) -> None:
    """Let the system end this process after so many seconds of computing, also in the middle of a C function."""
    with contextlib.suppress(AttributeError):  # a system without
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(size: int) -> None:
    """Let the process have so many bytes more than it has now, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm", "rb") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + size, taken + size))


if __name__ == "__main__":
    main()
