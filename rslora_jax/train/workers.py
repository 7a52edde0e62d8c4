"""A map over worker processes, for work that Python does on one core alone.

The workers are fresh interpreters. A fork would copy a process in which JAX has threads, which may deadlock.
`multiprocessing`'s "spawn" would run the user's script once more in each worker, and with it whatever is not
under `if __name__ == "__main__"`: loading the model, say.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_Process = subprocess.Popen[bytes]

# What importing this package logs has been said once already, by the parent.
_PROGRAM = """
import logging, pickle, sys
logging.disable(logging.WARNING)
sys.path[:] = pickle.load(sys.stdin.buffer)
from rslora_jax.train.workers import serve
serve()
"""


def map_in_processes(
    function: Callable[[Item], Answer], items: Iterable[Item], *, workers: int
) -> Generator[Answer, None, None]:
    """Give `function(item)` for each item, in order, computed by so many processes.

    Function, items and answers are pickled. What is defined in the user's script or notebook cannot be used:
    the workers do not run it. They see JAX's CPU device alone, and end with this iterator.

    Raises:
      ValueError: `function` cannot be pickled, or a worker came to its end.
      Exception: what `function` raised for the first item for which it did.

    >>> list(map_in_processes(len, ["a", "bcd", ""], workers=1))
    [1, 3, 0]
    """
    try:
        # To be unpickled where an error can be answered, hence a pickle in a pickle.
        setup = pickle.dumps(sys.path) + pickle.dumps(pickle.dumps(function))
    except Exception as error:  # each kind of object refuses in its own way
        raise ValueError(f"the work cannot be sent to other processes ({error}); give workers=1") from error
    processes: list[_Process] = []
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    greeted: set[int] = set()

    def ask(item: Item) -> Answer:
        process = idle.get()
        try:
            question = pickle.dumps(item) if process.pid in greeted else setup + pickle.dumps(item)
            greeted.add(process.pid)
            return _ask(process, question)
        finally:
            idle.put(process)

    pool = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            processes.append(_start())
            idle.put(processes[-1])
        yield from pool.map(ask, items)
    finally:
        # First, so that no thread waits for an answer that nobody wants any more.
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            _close(process)


def _start() -> _Process:
    command, alone = [sys.executable, "-P", "-c", _PROGRAM], {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=alone)


def _ask(process: _Process, question: bytes) -> Any:
    """Send a worker its next question, and return or raise its answer."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(question)
        process.stdin.flush()
        answer, failure = pickle.load(process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as broken:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        raise ValueError(
            f"a worker process came to an early end (exit status {process.returncode}); it may have run out of "
            "memory: give fewer workers, or workers=1"
        ) from broken
    if failure is not None:
        raise failure
    return answer


def _close(process: _Process) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    process.wait()


def serve() -> None:
    """Answer questions from stdin on stdout until stdin ends: the main function of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not be taken for an answer
    load = functools.cache(lambda: pickle.loads(code))
    code = pickle.load(questions)
    while True:
        try:
            item = pickle.load(questions)
        except EOFError:
            return
        answer, failure = None, None
        try:
            answer = load()(item)
        except Exception as error:
            failure = error
        pickle.dump((answer, failure), answers)
        answers.flush()
