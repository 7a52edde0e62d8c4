"""What `rslora train --new-tokens` does to a base, and keeps with the run."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from rslora_jax.commands.devices import Placement, base_shardings

_PART = re.compile(r"""\s*(?:"((?:[^"]|"")*)"|([^,]*?))\s*(,|\Z)""")


def with_new_tokens(a: argparse.Namespace, base: Any, placement: Placement) -> tuple[Any, dict[str, Any]]:
    """Return the base with the new tokens of --new-tokens, and the rows that are theirs; none without."""
    from rslora_jax.interop.enlarged import with_tokens

    if not a.new_tokens:
        return base, {}
    base, rows = with_tokens(base, tokens_of(a.new_tokens))
    return placed(base, placement), rows


def tokens_of(text: str) -> list[str]:
    """Read tokens with commas between them; in double quotes one may have commas, blanks at its ends, and quotes twice.

    >>> tokens_of('<tool>, </tool>," a, b"')
    ['<tool>', '</tool>', ' a, b']
    """
    found: list[str] = []
    at, more = 0, True
    while more:
        part = _PART.match(text, at)
        assert part is not None  # which takes any text
        found.append(part[2] if part[1] is None else part[1].replace('""', '"'))
        at, more = part.end(), bool(part[3])
    return found


def placed(base: Any, placement: Placement) -> Any:
    """Return a base with more rows than were read with its arrays where the rules have those of their shapes."""
    import jax

    if placement.mesh is None or base.rows is None:
        return base
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base.variables)
    where = base_shardings(placement, base.family)(shapes)
    return dataclasses.replace(base, variables=jax.device_put(base.variables, where))


def keep_new_tokens(a: argparse.Namespace, base: Any) -> None:
    """Keep the tokenizer with new tokens with a run."""
    from rslora_jax.interop.enlarged import write_tokenizer
    from rslora_jax.interop.load import folder_of

    write_tokenizer(base.tokenizer, folder_of(a.model), base.config.max_len, Path(a.out) / "tokenizer")
