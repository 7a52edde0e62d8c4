"""How the commands' flags are declared."""

from __future__ import annotations

from typing import Any


def add_flag(group: Any, flag: str, default: Any, text: str, **options: Any) -> None:
    """Add a flag of the kind of its default, which its help text shows.

    >>> import argparse
    >>> parser = argparse.ArgumentParser(prog="p", add_help=False)
    >>> add_flag(parser, "--rank", 32, "rank of every adapter", metavar="R")
    >>> parser.parse_args(["--rank", "8"]).rank, parser.format_help().splitlines()[-1].strip()
    (8, '--rank R  rank of every adapter (default 32)')
    """
    shows = isinstance(default, (str, int, float))
    kind = {"type": type(default)} if shows else {}
    group.add_argument(flag, default=default, help=text + (f" (default {default})" if shows else ""), **kind | options)
