"""The command `rslora`: what all commands have in common, so that none of them has it.

Help, versions, near misses, errors in one sentence, interrupts and exit statuses are here; a command's own flags and
what it does are in its file in `rslora_jax.commands`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rslora_jax.commands import chat, combine, evaluate, export_peft, generate, import_peft, inspect, merge, train
from rslora_jax.commands.command import Command, check_installed
from rslora_jax.commands.habits import in_our_words
from rslora_jax.terminal import one_line, shown

# In the order in which the help lists them.
COMMANDS: Mapping[str, Command] = {
    file.COMMAND.name: file.COMMAND
    for file in (train, generate, chat, evaluate, inspect, merge, combine, export_peft, import_peft)
}

_EXAMPLES = (
    ("rslora train", "Fine-tune SmolLM2-135M on docstrings of the Python standard library."),
    ('rslora generate rslora-run --prompt "What is LoRA?"', "Let the model answer, with the adapters of that run."),
    ("rslora train --help", "The flags of a command, and examples."),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    0; 1 after a failed run; 2 for bad input, a missing package or what cannot be written; 130 when interrupted, 143
    when asked to end (SIGTERM), 129 when the terminal is closed, 141 when the reader of the output has gone.
    """
    command, arguments = None, argparse.Namespace()
    try:
        with shown(), _ends_raise():
            command, arguments = parse(sys.argv[1:] if argv is None else argv)
            if command is None:
                print(_versions() if arguments.version else parser().format_help().rstrip())
                return 0
            check_installed(f"`rslora {command.name}`", command.needs)
            _quieten()
            status = command.run(arguments)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # The reader has gone, as `head` goes. At its end Python flushes once more, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, ImportError, OSError) as error:
        print(f"rslora: error: {one_line(_sentence(error))}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        return _stopped(stop, command.left(arguments) if command else "")


def parse(argv: Sequence[str]) -> tuple[Command | None, argparse.Namespace]:
    """Read a command line: which command, and its flags; None where it names none.

    Raises:
      ValueError: there is no such command or flag, or a flag's value is of another kind; says what comes close.

    >>> command, arguments = parse(["merge", "my-run", "--out", "merged"])
    >>> command.name, arguments.folder, arguments.dtype
    ('merge', 'my-run', 'bfloat16')
    """
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ValueError(
            f"there is no command {argv[0]}; {_near(argv[0], COMMANDS) or 'there are ' + ', '.join(COMMANDS)}"
        )
    command, arguments = _parse_with({}, argv)
    settings: dict[str, Any] = {}
    for more in command.settings if command else ():
        settings |= more(arguments)
        _, arguments = _parse_with(settings, argv)
    return command, arguments


def parser(settings: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """Build the parser of the command line; `settings` take the place of the defaults of the flags of their names."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = _Parser(prog="rslora", description="Rank-stabilised LoRA for JAX.", epilog=_laid_out(_EXAMPLES), **layout)
    top.add_argument("--version", action="store_true", help="show the versions of this package, of JAX and of Flax")
    commands = top.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for command in COMMANDS.values():
        its = commands.add_parser(
            command.name,
            help=command.summary,
            description=_filled(command.description),
            epilog=_laid_out(command.examples, command.note),
            **layout,
        )
        command.add_flags(its)
        its.set_defaults(**settings or {})
    return top


def _versions() -> str:
    """Say which versions of this package and of what it stands on are installed."""
    found = {name: _version(name) for name in ("rslora_jax", "jax", "flax")}
    return (
        f"rslora {found['rslora_jax']} (jax {found['jax']}, flax {found['flax']}, Python {platform.python_version()})"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from its folder


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others: one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        chosen = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        hint = _near(chosen[1], re.findall(r"[\w./-]+", chosen[2])) if chosen else ""
        raise ValueError(f"{message}; {hint or f'`{self.prog} --help` shows the flags'}")


def _parse_with(settings: Mapping[str, Any], argv: Sequence[str]) -> tuple[Command | None, argparse.Namespace]:
    """Read a command line, with settings in place of the defaults."""
    words = _with_negative(argv)
    if words and (named := COMMANDS.get(words[0])):
        words = [words[0], *in_our_words(words[1:], _flags_of(named), named.name == "train")]
    arguments, unknown = parser(settings).parse_known_args(words)
    command = COMMANDS.get(arguments.command)
    if unknown:
        raise ValueError(_no_place(command, unknown[0]))
    if command is None or arguments.version:
        return None, arguments
    del arguments.command, arguments.version
    return command, arguments


def _with_negative(argv: Sequence[str]) -> list[str]:
    """Give what begins with a minus and a number to the flag before it, which argparse does for a number alone.

    >>> _with_negative(["combine", "one", "--weights", "-0.5,1"])
    ['combine', 'one', '--weights=-0.5,1']
    """
    joined: list[str] = []
    for argument in argv:
        if joined and re.match(r"--[\w-]+$", joined[-1]) and re.match(r"-\.?\d", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _no_place(command: Command | None, argument: str) -> str:
    """Say that nothing takes an argument, and which flag comes close."""
    prog, flags = "rslora", re.findall(r"--[\w-]+", parser().format_usage())
    if command:
        prog, flags = f"rslora {command.name}", _flags_of(command)
    flag = argument.partition("=")[0]
    others = [f"`rslora {other.name}`" for other in COMMANDS.values() if flag in _flags_of(other)]
    hint = f"it is a flag of {' and '.join(others[:2])}" if others else _near(flag, flags)
    what = f"no flag {argument}" if argument.startswith("-") else f"no place for {argument}"
    return f"`{prog}` has {what}; {hint or f'`{prog} --help` shows what it takes'}"


def _flags_of(command: Command) -> list[str]:
    """Return the flags of a command."""
    its = argparse.ArgumentParser()
    command.add_flags(its)
    return re.findall(r"--[\w-]+", its.format_usage())


def _near(word: str, words: Iterable[str]) -> str:
    """Ask for the word that comes close; nothing where none does."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _laid_out(examples: Sequence[tuple[str, str]], note: str = "") -> str:
    """Lay out command lines, under each what it is for, and a note after them.

    >>> print(_laid_out([("rslora train", "To see it work.")]))
    examples:
      rslora train
          To see it work.
    """
    lines = ["examples:"]
    for command, text in examples:
        lines += [_continued(command), _filled(text, " " * 6)]
    return "\n".join([*lines, "", _filled(note)] if note else lines)


def _filled(text: str, indent: str = "") -> str:
    """Break a text into lines as wide as argparse makes its own."""
    return textwrap.fill(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _continued(command: str) -> str:
    """Break a command line before flags where it is too long, as a shell takes it."""
    lines = [" "]
    for piece in re.split(" (?=--)", command):
        if len(lines[-1]) + len(piece) + 3 > _width():
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {piece}"
    return "\n".join(lines)


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 120) - 2)


def _quieten() -> None:
    """Silence what grain and orbax warn of through absl, of which no user here can act on anything."""
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # errors of theirs are told by ours, without their tracebacks


class _Terminated(BaseException):
    """The process was asked to end, by this signal. Like Ctrl-C it passes through what clears up."""


@contextlib.contextmanager
def _ends_raise() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a closed terminal, raise `_Terminated`, where nobody has a handler of their own."""
    is_main = threading.current_thread() is threading.main_thread()  # no other may have handlers
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [kind for kind in kinds if is_main and signal.getsignal(kind) is signal.SIG_DFL]

    def take(kind: int, frame: Any) -> None:
        raise _Terminated(kind)

    for kind in ours:
        signal.signal(kind, take)
    try:
        yield
    finally:
        for kind in ours:
            signal.signal(kind, signal.SIG_DFL)


def _stopped(stop: BaseException, left: str) -> int:
    """Say that the command was stopped and what it has left; return the exit status."""
    kind, said = (stop.args[0], "ended") if isinstance(stop, _Terminated) else (signal.SIGINT, "interrupted")
    line = "\n" if sys.stderr.isatty() else ""  # there ^C stands in the line
    print(f"{line}rslora: {said}{'; ' if left else ''}{one_line(left)}", file=sys.stderr)
    return 128 + kind


def _sentence(error: Exception) -> str:
    """Say what an error says; of the system's, which place it is about, too.

    >>> _sentence(PermissionError(13, "Permission denied", "my-run"))
    'my-run: permission denied'
    """
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
