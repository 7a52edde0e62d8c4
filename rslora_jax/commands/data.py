"""The data of `rslora train` and `rslora eval`: which examples are learnt from, and which are held out."""

from __future__ import annotations

from typing import Any

from rslora_jax.train import docstring_pairs, read_examples


def examples(data: str | None, limit: int) -> tuple[list[Any], list[Any]]:
    """Return (training examples, at most `limit` held-out ones, spread evenly over what is held out).

    Without a file, the docstrings of Python. Every tenth example of a file is held out, of fewer than ten the last.
    """
    if data is None:
        training, held = list(docstring_pairs("train")), list(docstring_pairs("heldout"))
    else:
        everything = read_examples(data)
        places = range(9, len(everything), 10) or range(1, len(everything))[-1:]
        held = [everything[n] for n in places]
        training = [example for n, example in enumerate(everything) if n not in places]
    return training, spread(held, limit)


def spread(chosen: list[Any], limit: int) -> list[Any]:
    """Give at most `limit` of a list, spread evenly over it.

    >>> spread([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    return chosen[:: max(1, -(-len(chosen) // max(limit, 1)))]
