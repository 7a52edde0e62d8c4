"""What a terminal is shown: text as it is, with what would steer the terminal written out.

Data, answers of models, tokens and names of files may hold control characters, which move the cursor, set colours,
change the window's title or hide what comes before. Files and pipes get them as they are.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# Control characters but the newline, half surrogates, ends of lines that are none to others, and what changes the
# direction of the text after it or is invisible; not the joiners, without which some scripts are spelt wrong.
_STEERING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Write out the characters of a text that would steer a terminal; a tab becomes spaces.

    >>> printable("a\\x1b[31mb\\r\\n\\u202ec\\td")
    'a\\\\x1b[31mb\\\\r\\n\\\\u202ec    d'
    """
    return _STEERING.sub(_written_out, text)


def one_line(text: str, most: int = 300) -> str:
    """Write a text as one line that can be printed, without its middle where it is too long.

    >>> one_line("a\\nb"), one_line("a" * 500 + "z", 10)
    ('a\\\\nb', 'aaaa...aaz')
    """
    text = printable(text).replace("\n", "\\n")
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - tail - 3]}...{text[len(text) - tail :]}"


def _written_out(found: re.Match[str]) -> str:
    return "    " if found[0] == "\t" else ascii(found[0])[1:-1]


class Shown:
    """A stream on a terminal, on which all that is written is made printable."""

    def __init__(self, stream: Any):
        self.bare = stream

    def write(self, text: str) -> int:
        """Write a text; return how many characters of it were taken, which is all."""
        self.bare.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Make what is printed printable, where it goes to a terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_on_terminal, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _on_terminal(stream: Any) -> Any:
    return Shown(stream) if stream is not None and stream.isatty() else stream


def bar_console(**options: Any) -> Any:
    """Return a console of rich's on the standard output as it is, for bars, which steer the terminal on purpose."""
    from rich.console import Console

    return Console(file=getattr(sys.stdout, "bare", sys.stdout), **options)


def start_bar(bar: Any) -> None:
    """Start a bar of rich's, which has what is printed go through its console until it stops."""
    before = sys.stdout, sys.stderr
    bar.start()
    if sys.stdout is not before[0]:
        sys.stdout = Shown(sys.stdout)
    if sys.stderr is not before[1]:
        sys.stderr = Shown(sys.stderr)
