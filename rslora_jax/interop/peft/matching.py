"""The regular expressions of an adapter_config.json, matched as PEFT does, within a limit."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rslora_jax.confined import Exceeded, ask

# One question may take `confined.process.SECONDS` on its own.
_SECONDS = 3.0


@dataclasses.dataclass(eq=False)
class Matcher:
    """Match the regular expressions of one file, within some seconds for all of them together.

    They are Python's, as in PEFT, hence matched by Python; some of them take for ever, so another process does it.

    >>> matcher = Matcher(Path("adapter_config.json"))
    >>> matcher.first("match", (r".*\\.v_proj", r"layers\\.(?P<number>\\d+)"), "layers.7.q_proj")
    (1, '7')
    """

    where: Path
    spent: float = 0.0

    def first(self, how: str, patterns: tuple[str, ...], text: str) -> tuple[int, str | None] | None:
        """Match a text by a function of `re`: give the number of the first pattern that does, and its group "number".

        Raises:
          Exceeded: they take too long; a ValueError.
          ValueError: one is no regular expression.
        """
        if not patterns:
            return None
        begun = time.monotonic()
        try:
            found = ask("patterns", (how, patterns, [text]))[0]
        except Exceeded as error:
            raise self._too_much(str(error)) from error
        except ValueError as error:
            raise ValueError(f"{self.where} has what is no regular expression: {error}") from error
        self.spent += time.monotonic() - begun
        if self.spent > _SECONDS:
            raise self._too_much(f"takes more than {_SECONDS:g} s")
        return found

    def _too_much(self, what: str) -> Exceeded:
        return Exceeded(f"{self.where}: matching its regular expressions {what}: write simpler ones, or list the names")
