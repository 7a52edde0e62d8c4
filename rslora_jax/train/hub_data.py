"""Data sets of Hugging Face: by name from the hub, or folders that `datasets` saved."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from rslora_jax.shown import reason_of, shown
from rslora_jax.train.forms import FORMS_HELP

_PREFIX = "hf:"
_NAME = re.compile(r"[\w-]+/[\w.-]+(:[\w.-]+){0,2}")
# What `datasets` writes beside the tables of one set, and of several by their splits.
_SAVED = ("state.json", "dataset_dict.json")


def is_hub_name(path: str | PathLike[str]) -> bool:
    """Say whether a path is rather the name of a data set: hf:NAME, or owner/name where there is no such folder.

    >>> is_hub_name("hf:gsm8k:main"), is_hub_name("no-such-owner/capybara"), is_hub_name("no-such-folder/mine.jsonl.gz")
    (True, True, False)
    """
    text = str(path)
    if text.startswith(_PREFIX):
        return True
    owner, _, name = text.partition("/")
    has_suffix = re.search(r"\.[a-z]+(\.gz)?$", name, re.IGNORECASE)
    return bool(_NAME.fullmatch(text)) and not has_suffix and not Path(owner).exists()


def is_saved_set(path: str | PathLike[str]) -> bool:
    """Say whether a folder is one that `datasets` saved."""
    return any(Path(path, name).is_file() for name in _SAVED)


def hub_rows(path: str, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the rows of a data set with the columns that are wanted.

    A name is owner/name, behind it a configuration and a split if it has several: hf:openai/gsm8k:main:test. Without a
    split it is that of training. No code of a data set is run.

    Raises:
      ValueError: `datasets` is not installed, the set cannot be read, or it has none of the columns.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{path} is no file here, and a data set of Hugging Face is read by `datasets`: pip install datasets"
        )
    import datasets

    name, *rest = path.removeprefix(_PREFIX).split(":")
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
            found = found[rest[-1] if rest else "train"] if isinstance(found, datasets.DatasetDict) else found
        else:
            split = rest[-1] if rest else "train"
            found = datasets.load_dataset(name, *rest[:-1], split=split)
        columns = [column for column in found.column_names if column in wanted]
        found = found.select_columns(columns)
    except Exception as error:  # each of its sources fails in its own way
        raise ValueError(f"{path} cannot be read ({reason_of(error, 200)}); give owner/name:CONFIG:SPLIT") from error
    if not columns:
        raise ValueError(
            f"{path} has the columns {shown(', '.join(found.column_names), 120)}; name them as {FORMS_HELP}"
        )
    yield from enumerate(found, start=1)
