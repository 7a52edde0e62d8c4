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
    own = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return next((one for one in (folder / _KEPT, folder) if any((one / name).is_file() for name in own)), None)


def is_whole(folder: Path) -> bool:
    """Say whether a tokenizer's folder has its tokens, and not only what is said of the base's: a template, an end."""
    return (folder / "tokenizer.json").is_file()


def same_files(one: Path, other: Path) -> bool:
    """Say whether two folders have the same files of a tokenizer."""
    pairs = [(one / name, other / name) for name in _FILES]
    return all(a.is_file() == b.is_file() and (not a.is_file() or a.read_bytes() == b.read_bytes()) for a, b in pairs)


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
