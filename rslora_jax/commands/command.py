"""What a command of `rslora` is to the command line (`rslora_jax.cli`), which does all that commands have in common."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _nothing(arguments: argparse.Namespace) -> str:
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Hold a command: its name, its help, its flags, and what it does.

    Attributes:
      name: the word on the command line.
      summary: what it does, in the list of commands.
      description: what it does, in a sentence or two.
      examples: command lines, and what each is for.
      note: a paragraph at the end of the help.
      add_flags: adds its flags to a parser.
      run: does it, and returns the exit status: 0, or 1 for a run that failed. Bad input is a ValueError of one
        sentence.
      settings: from the flags as they are so far, values by flag in place of the defaults, such as those of a file; of
        several functions a later one goes first.
      left: what it has left of its work where it is interrupted.
      needs: the packages of the extra `train` that it imports on its way.

    >>> def greet(arguments: argparse.Namespace) -> int:
    ...     print("Hello,", arguments.name)
    ...     return 0
    >>> def add_flags(parser: argparse.ArgumentParser) -> None:
    ...     parser.add_argument("--name", default="you")
    >>> command = Command(name="greet", summary="say hello", description="Say hello.",
    ...                   examples=(("rslora greet", "To you."),), add_flags=add_flags, run=greet)
    >>> command.run(default_arguments(command))
    Hello, you
    0
    """

    name: str
    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    note: str = ""
    settings: tuple[Callable[[argparse.Namespace], Mapping[str, Any]], ...] = ()
    left: Callable[[argparse.Namespace], str] = _nothing
    needs: tuple[str, ...] = ()


# What reads a model and its tokenizer, and shows how far it is.
FOR_MODELS = ("gguf", "tokenizers", "jinja2", "rich")


def check_installed(what: str, packages: Sequence[str], *, extra: str = "train") -> None:
    """Raise an ImportError that names the first of some packages that is not installed, and how to get it.

    >>> check_installed("`rslora bake`", ["flour"])
    Traceback (most recent call last):
    ImportError: `rslora bake` needs flour: pip install 'rslora_jax[train]'
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{what} needs {package}: pip install 'rslora_jax[{extra}]'")


def default_arguments(command: Command) -> argparse.Namespace:
    """Return what the flags of a command are where none is given; it must ask for none."""
    parser = argparse.ArgumentParser(add_help=False)
    command.add_flags(parser)
    return parser.parse_args([])
