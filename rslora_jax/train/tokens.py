"""The tokens of a whole data set, made here or in worker processes, or read from a cache."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rslora_jax.train import cache as caching
from rslora_jax.train.encode import Tokenizer, Tokens, encode_all
from rslora_jax.train.examples import Example
from rslora_jax.train.workers import map_in_processes

Progress = Callable[[int, int], None]

# Measured with SmolLM2's tokenizer: a worker takes 1.3 s of a core to start (it imports the package), and 2**21
# characters take 2.8 s to encode. Two workers break even with one process at 2 million characters in all.
_CHARACTERS_A_WORKER = 2**21
# About 0.1 s of work: enough to hide the pickling, little enough to share evenly and to show progress.
CHARACTERS_A_CHUNK = 2**16


def tokenise(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    workers: int | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    skip_bad: bool = False,
) -> Tokens:
    """Encode all examples; the result depends on neither `workers` nor `cache`.

    Args:
      workers: how many processes encode, 1 for this one alone. By default as many as there are cores, but no
        more than the data keep busy for some seconds; this one alone for little data, or for a tokenizer that
        other processes cannot have (not picklable, or its class is defined in the user's script or notebook).
      cache: a folder. The tokens are kept there, in a file named by a hash of the examples and the tokenizer.
      progress: called here with (examples done, examples in all) a few times a second.
      skip_bad: those that cannot be encoded have no sequence, in place of an error.

    Raises:
      ValueError: an example cannot be encoded (the first such one is named), `workers` is below 1, the
        tokenizer cannot be sent to workers, or `cache` is no folder.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> tokenise(ByteTokenizer(), [Example("ab", "c"), Example("", "d")]).ids_N.tolist()
    [97, 98, 99, 256, 100, 256]
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if workers is not None and workers > 1 and _is_defined_in_script(tokenizer):
        raise ValueError(
            f"the class {type(tokenizer).__name__} of the tokenizer is defined in the script, which worker processes "
            "do not run; move it to a module, or give workers=1"
        )
    file = None if cache is None else caching.file_for(cache, tokenizer, examples)
    tokens = None if file is None else caching.load(file, len(examples))
    report = progress or (lambda done, total: None)
    if tokens is not None:
        report(len(examples), len(examples))
        return tokens
    encode = functools.partial(encode_all, tokenizer, skip_bad=skip_bad)
    chunks = list(_chunks(examples))
    workers = min(workers or workers_for(tokenizer, examples), len(chunks))
    parts = (encode(chunk) for chunk in chunks) if workers == 1 else map_in_processes(encode, chunks, workers=workers)
    found, done = [], 0
    with contextlib.closing(parts):  # so that an interrupted caller leaves no process behind
        for part in parts:
            found.append(part)
            done += len(part.sequences_E)
            report(done, len(examples))
    tokens = _join(found)
    if file is not None:
        caching.save(file, tokens)
    return tokens


def _join(parts: Sequence[Tokens]) -> Tokens:
    return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def workers_for(tokenizer: Tokenizer, examples: Sequence[Example]) -> int:
    """Return how many processes are worth their start, 1 where a tokenizer cannot be sent to them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(cores, sum(map(_size, examples)) // _CHARACTERS_A_WORKER)
    return wanted if wanted > 1 and _can_be_sent(tokenizer) else 1


def _can_be_sent(tokenizer: Tokenizer) -> bool:
    try:
        pickle.dumps(tokenizer)
    except Exception:  # each kind of object refuses in its own way
        return False
    return not _is_defined_in_script(tokenizer)


def _is_defined_in_script(tokenizer: Tokenizer) -> bool:
    return type(tokenizer).__module__ == "__main__"


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    start = size = 0
    for end, example in enumerate(examples, start=1):
        size += _size(example)
        if size >= CHARACTERS_A_CHUNK or end == len(examples):
            yield examples[start:end]
            start, size = end, 0


def _size(example: Example) -> int:
    prompt = example.prompt
    before = len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
    return before + len(example.completion)
