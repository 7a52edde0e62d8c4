"""How the commands' flags are declared and checked, and those that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# `shared` adds them by name; what a command means otherwise, it says there.
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "folder": {"text": "of a run, of one of its checkpoints, or of PEFT", "metavar": "FOLDER"},
    "--model": {"text": "the base, where it is not where the run found it", "metavar": "MODEL"},
    "--step": {"text": "which checkpoint (default: the last)", "metavar": "last|best|N"},
    "--dtype": {
        "text": "dtype to compute in (default: the run's, or float32)",
        "choices": ("float32", "bfloat16"),
    },
    "--param-dtype": {
        "default": "float32",
        "text": "dtype to hold the base in",
        "choices": ("float32", "bfloat16"),
    },
    "--data": {"text": "a .jsonl, .parquet or .txt file (default: docstrings of Python)", "metavar": "FILE"},
    "--max-len": {
        "default": 256,
        "text": "tokens in a row; longer examples are cut, longer text is split",
        "metavar": "N",
    },
    "--template-option": {
        "default": [],
        "text": "a value that the chat template looks at, such as enable_thinking=false; as often as you like",
        "metavar": "NAME=VALUE",
        "action": "append",
    },
    "--heldout": {"default": 32, "text": "at most so many held-out examples", "metavar": "N"},
    "--batch-size": {"default": 8, "text": "rows or prompts that are taken together", "metavar": "N"},
    "--max-new": {"default": 256, "text": "most tokens of an answer", "metavar": "N"},
    "--out": {"text": "new folder to write", "metavar": "FOLDER"},
}


def add_flag(group: Any, flag: str, default: Any, text: str, **options: Any) -> None:
    """Add a flag of the kind of its default, which its help text shows.

    >>> parser = argparse.ArgumentParser(prog="p", add_help=False)
    >>> add_flag(parser, "--rank", 32, "rank of every adapter", metavar="R")
    >>> parser.parse_args(["--rank", "8"]).rank, parser.format_help().splitlines()[-1].strip()
    (8, '--rank R  rank of every adapter (default 32)')
    """
    shows = isinstance(default, (str, int, float))
    kind = {"type": type(default)} if shows else {}
    group.add_argument(flag, default=default, help=text + (f" (default {default})" if shows else ""), **kind | options)


def shared(group: Any, flag: str, **changes: Any) -> None:
    """Add a flag that several commands have, with what this command changes of it: `default`, `text` and others.

    >>> parser = argparse.ArgumentParser()
    >>> shared(parser, "--batch-size", default=2)
    >>> parser.parse_args([]).batch_size
    2
    """
    add_flag(group, flag, **{"default": None, **_SHARED[flag], **changes})


def check_above_zero(arguments: argparse.Namespace, *names: str) -> None:
    """Raise a ValueError where one of these flags is given and not above 0."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not above 0")


def check_parent(flag: str, path: str | None) -> None:
    """Raise a ValueError where the folder of a file that is to be written is not there."""
    if path and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{Path(path).parent} is no folder: make it before {flag} {path}")
