"""Read and write JSON objects, and refuse what other readers would read otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslora_jax.shown import reason_of, shown

# Bytes of JSON that are read: a few make an object of many times their size.
LARGEST_JSON = 1 << 25


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
      ValueError: it cannot be read, holds something else, or a key twice, of which readers take the first or the last.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{path} has {size} bytes: no such file of a model or an adapter is so large")
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Read a JSON object from the bytes of a file, or of a part of it; errors as of `read_json`.

    >>> parse_json(Path("a.json"), b'{"r": 3, "r": 5}')
    Traceback (most recent call last):
    ValueError: a.json is damaged: its JSON cannot be read ("r" is there twice)
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_without_repeats)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its JSON cannot be read ({reason_of(error)})") from error
    return found


def json_text(content: Mapping[str, Any]) -> str:
    """Write an object as the text of a file.

    >>> json_text({"name": "ü"})
    '{\\n  "name": "ü"\\n}\\n'
    """
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(json.dumps(key))} is there twice")
        found[key] = value
    return found
