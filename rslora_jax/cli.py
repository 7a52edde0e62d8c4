"""The command `rslora`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rslora_jax.commands import evaluate, export_peft, generate, import_peft, inspect, merge, train


def parser(settings: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """Build the parser of the command line; `settings` take the place of the defaults of `rslora train`."""
    top = argparse.ArgumentParser(
        prog="rslora", description="Rank-stabilised LoRA for JAX.", epilog="`rslora train --help` shows examples."
    )
    commands = top.add_subparsers(dest="command", required=True)
    train.add(commands, settings)
    import_peft.add(commands)
    export_peft.add(commands)
    merge.add(commands)
    inspect.add(commands)
    generate.add(commands)
    evaluate.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    0; 1 after a failed run; 2 for bad input; 130 when interrupted, 143 when asked to end (SIGTERM).
    """
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments, argv)
    except (ValueError, ImportError) as error:
        print(f"rslora: error: {error}", file=sys.stderr)
        return 2
