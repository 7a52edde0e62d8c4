"""How a base is held in memory: as arrays, in the blocks of its file, or rounded to a format as it is read.

A run tells it by its base's checksums, so that whoever opens it later holds the base the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslora_jax.store.checksum import read_form
from rslora_jax.stored.rounding import rounding

# What a base is rounded to as it is read, by the name of the format that it then has.
_FORMATS = {"NF4": "nf4", "Int8": "int8", "Float8": "float8"}


def check_held(dequantize: bool, quantize: str | None) -> None:
    """Raise a ValueError for a format that there is not, or where the two contradict each other."""
    if quantize is not None:
        rounding(quantize)
    if quantize is not None and dequantize:
        raise ValueError(
            f"the base is to be quantised to {quantize} and dequantised: ask for one of the two; what a file has in "
            "other blocks is dequantised tensor by tensor before it is quantised"
        )


def formats(base: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the formats in which a base is stored, by `checksums` of it.

    >>> formats({"w": "Q4_1 of float32[30,576] 5d0c", "norm": "float32[576] 83ab"})
    ('Q4_1',)
    """
    found = [form.format for text in base.values() if (form := read_form(text)) and form.format]
    return tuple(sorted(set(found)))


def held_as(base: Mapping[str, str]) -> dict[str, Any]:
    """Return how `load_model` is to hold a base so that it has these `checksums`: its `dequantize` and `quantize`.

    Files that are in that format themselves are to be read as they are, without the second.

    >>> held_as({"w": "float32[8,8] 5d0c"}), held_as({"w": "Int8 of float32[8,8] 5d0c"})
    ({'dequantize': True, 'quantize': None}, {'dequantize': False, 'quantize': 'int8'})
    """
    found = formats(base)
    made = _FORMATS.get(found[0]) if len(found) == 1 else None
    return {"dequantize": bool(base) and not found, "quantize": made}


def check_formats(source: Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compare how a run's base was held with how this one is, by `checksums` of both.

    Raises:
      ValueError: in other formats; it names both, and what to give.
    """
    if formats(saved) == formats(here):
        return
    how = held_as(saved)
    give = f"--quantize {how['quantize']}" if how["quantize"] else "--dequantize" if how["dequantize"] else ""
    raise ValueError(
        f"{source} was trained on a base held {said_of(saved)}, and this one is held {said_of(here)}: give "
        f"{give or 'the files that have it so, and neither --quantize nor --dequantize'}"
    )


def said_of(base: Mapping[str, str]) -> str:
    """Say in what form a base is held, by `checksums` of it.

    >>> said_of({"w": "Q4_1 of float32[8,8] 5d0c"}), said_of({"w": "float32[8,8] 5d0c"})
    ('in Q4_1', 'as arrays')
    """
    return f"in {' and '.join(found)}" if (found := formats(base)) else "as arrays"
