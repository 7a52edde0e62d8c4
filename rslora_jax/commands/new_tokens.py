"""What `rslora train --new-tokens` does to a base, and keeps with the run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rslora_jax.commands.devices import Placement, base_shardings


def with_new_tokens(a: argparse.Namespace, base: Any, placement: Placement) -> tuple[Any, dict[str, Any]]:
    """Return the base with the new tokens of --new-tokens, and the rows that are theirs; none without."""
    from rslora_jax.interop.enlarged import with_tokens

    if not a.new_tokens:
        return base, {}
    base, rows = with_tokens(base, [text.strip() for text in a.new_tokens.split(",")])
    return placed(base, placement), rows


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
