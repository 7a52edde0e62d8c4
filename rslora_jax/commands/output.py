"""What the commands say and write."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def tell(text: str) -> None:
    """Say on the standard error what is no result."""
    print(text, file=sys.stderr, flush=True)


def model_name(model: str | None, settings: Mapping[str, Any] | None = None) -> str:
    """Say which base is read: the one that a flag gives, that of the run's settings, or SmolLM2.

    >>> model_name(None, {"model": "my-llama"}), model_name(None)
    ('my-llama', 'SmolLM2')
    """
    return model or (settings or {}).get("model") or "SmolLM2"


def write_text_whole(path: str | Path, text: str) -> None:
    """Write a file that is never there by half."""
    draft = Path(f"{path}.tmp")
    with writing(path, draft):
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


@contextlib.contextmanager
def writing(out: str | Path, *drafts: Path) -> Iterator[None]:
    """Turn what the system refuses while a place is written into a ValueError that names it; no draft is left."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {(error.strerror or str(error)).lower()}") from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def whether_written(arguments: Any) -> str:
    """Say whether the folder --out is there, which is written whole or not at all."""
    out = Path(arguments.out)
    return f"{out} is written" if out.is_dir() and any(out.iterdir()) else "nothing was written"
