"""Where the tokenizer lies that belongs to adapters, and how its files are kept, as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Of a run's folder: that of the adapters that it began with.
_KEPT = "tokenizer"


def tokenizer_beside(folder: Path) -> Path | None:
    """Return the folder of the tokenizer that belongs to adapters: a folder of PEFT itself, or one within a run's."""
    return next((one for one in (folder / _KEPT, folder) if (one / "tokenizer.json").is_file()), None)


def keep_tokenizer(folder: Path | None, run: Path) -> None:
    """Keep a tokenizer with a new run; None forgets what an earlier run there had, of which no checkpoint is left."""
    if folder != (kept := run / _KEPT):
        shutil.rmtree(kept, ignore_errors=True)
        if folder is not None:
            copy_tokenizer(folder, kept)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the files of a tokenizer as they are."""
    out.mkdir(parents=True, exist_ok=True)
    more = (str(path.relative_to(folder)) for path in folder.glob("additional_chat_templates/*.jinja"))
    for name in (*_FILES, *more):
        if (folder / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
