"""How a model's answers are written: which tokens are chosen, text as it comes, where it stops, and how fast."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rslora_jax.commands.flags import add_flag, shared
from rslora_jax.commands.output import tell

_CHOOSING: tuple[tuple[str, type, dict[str, float], str], ...] = (
    (
        "--temperature",
        float,
        {"least": 0},
        "0 takes the likeliest token; above, one is drawn (default: the model's own, or 0)",
    ),
    ("--top-k", int, {"least": 0}, "draw among so many of the likeliest tokens; 0 for all"),
    ("--top-p", float, {"above": 0, "most": 1}, "draw among the likeliest tokens that hold so much of the probability"),
    ("--min-p", float, {"least": 0, "most": 1}, "draw among tokens that are at least so likely beside the likeliest"),
    (
        "--repetition-penalty",
        float,
        {"above": 0},
        "divide the logits of tokens that are there already by so much; 1 for none",
    ),
)


def add_answer_flags(how: Any) -> None:
    """Add the flags that say how long answers are and by what tokens are chosen."""
    shared(how, "--max-new", default=None, text="most tokens of an answer (default: the model's own, or 256)", type=int)
    # What is not said is as the model's generation_config.json has it.
    for flag, kind, bounds, text in _CHOOSING:
        add_flag(how, flag, None, text, metavar="N" if kind is int else "X", type=kind, **bounds)
    ends = "end an answer before this text; as often as you like"
    add_flag(how, "--stop", [], ends, metavar="TEXT", action="append", type=_some_text)
    add_flag(how, "--seed", 0, "seed of what is drawn", metavar="N", least=0)


def _some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty, and every text begins with it")
    return text


def answer_options(a: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """Give how tokens are chosen, by the flags and the model's generation_config.json, and say what that decides."""
    from rslora_jax.interop.generation_config import read_generation

    asked = read_generation(folder)
    flags = [flag.removeprefix("--").replace("-", "_") for flag, *_ in _CHOOSING]
    how, used = asked.how({name: getattr(a, name) for name in flags})
    max_new = a.max_new or asked.obeyed.get("max_new_tokens")
    used += [f"max_new_tokens={max_new}"] if max_new and not a.max_new else []
    said = f"as generation_config.json asks: {', '.join(used)}" if used else "of generation_config.json"
    said += f"; not obeyed: {', '.join(asked.ignored)}" if asked.ignored else ""
    if used or asked.ignored:
        tell(said)
    return {"max_new": max_new or 256, **how}


@dataclasses.dataclass
class Speed:
    """Count tokens and seconds, those of compiling apart."""

    compiling: float = 0.0
    reading: float = 0.0
    writing: float = 0.0
    read: int = 0
    new: int = 0

    def of(self, going: Any, prompts: Sequence[list[int]], chunk: int) -> Iterator[list[list[int]]]:
        """Give the pieces of a compiled batch, whose first rows are for `prompts`, and count tokens and seconds."""
        import jax

        from rslora_jax.models.generation import pieces

        begun = time.perf_counter()
        state = jax.block_until_ready(going.read())
        self.reading += time.perf_counter() - begun
        self.read += sum(map(len, prompts))
        begun = time.perf_counter()
        for piece in pieces(going, state, chunk):
            self.writing += time.perf_counter() - begun
            self.new += sum(map(len, piece[: len(prompts)]))
            yield piece
            begun = time.perf_counter()

    def __str__(self) -> str:
        return (
            f"prompt tokens {_rate(self.read, self.reading)}, new tokens {_rate(self.new, self.writing)}, "
            f"after {self.compiling:.1f} s to compile"
        )


def _rate(count: int, seconds: float) -> str:
    """Write a number of tokens, and how many that is in a second.

    >>> _rate(30, 2.0)
    '30 (15/s)'
    """
    return f"{count} ({count / max(seconds, 1e-9):.0f}/s)"


def unfolding(pieces: Iterable[Sequence[int]], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Give a text part by part as its tokens come; the parts, joined, are the text of all tokens.

    What more tokens may change is held back: half a character at the end, which decodes to U+FFFD.

    >>> halves = [[0x63, 0xC3], [0xA9], [0xC3]]
    >>> list(unfolding(halves, lambda row: bytes(row).decode(errors="replace")))
    ['c', 'é', '\ufffd']
    """
    row: list[int] = []
    shown = ""
    for piece in pieces:
        row += piece
        text = decode(row).rstrip("\ufffd")
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    whole = decode(row)
    if whole.removeprefix(shown):
        yield whole.removeprefix(shown)


def until_stop(parts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Give the parts of a text up to the first of some texts; what may be the begin of one is held back.

    >>> list(until_stop(["one, t", "wo", " END th", "ree"], ["END", "two"]))
    ['one, ']
    >>> list(until_stop(["a ", "tw", "ig"], ["two"]))
    ['a ', 'twig']
    """
    held = ""
    for part in parts:
        held += part
        if found := [at for at in map(held.find, stops) if at >= 0]:
            if held[: min(found)]:
                yield held[: min(found)]
            return
        longest = max((len(stop) for stop in stops), default=0)
        keep = next((n for n in range(min(longest - 1, len(held)), 0, -1) if _begins(held[-n:], stops)), 0)
        if ready := held[: len(held) - keep]:
            yield ready
            held = held[len(held) - keep :]
    if held:
        yield held


def _begins(text: str, stops: Sequence[str]) -> bool:
    return any(stop.startswith(text) for stop in stops)
