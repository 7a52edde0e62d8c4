"""Patterns for one module alone, which every version of PEFT reads alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def exact_patterns(own: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Give PEFT's `rank_pattern` or `alpha_pattern` for the modules whose value is not the usual one.

    PEFT takes the first key that matches the end of a module's name: 0.14 from behind a dot (`.*\\.KEY$`), from 0.15
    on also the whole (`(.*\\.)?(KEY)$`); where none does, that which is the name. So a whole name is a key for all of
    them, where it is the end of no other's. Where it is, keys that look back at the beginning are put before it.

    Args:
      own: the value of every adapted module, by name.
      usual: that of the config for all others.

    >>> exact_patterns({"layers.0.up": 3, "layers.1.up": 5}, 3)
    {'layers.1.up': 5}
    >>> exact_patterns({"up": 5, "block.up": 3}, 3)
    {'(?<=^block\\\\.)up': 3, 'up': 5}
    """
    first: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for module, value in own.items():
        if value == usual:
            continue
        others = _taken_too(module, own)
        if not others and _is_plain(module):
            plain[module] = value
        elif "." in module:
            first[_exact(module)] = value
        else:
            # Behind a dot there is nothing of it, so that only the name itself will do; the others go first.
            first |= {_exact(other): own[other] for other in others}
            plain[module if _is_plain(module) else f"^{re.escape(module)}"] = value
    return first | plain


def _taken_too(module: str, names: Iterable[str]) -> list[str]:
    """Return the other modules that a name, as a pattern, would match."""
    size = len(module)
    # A dot matches any one character, so that what is matched is as long as the pattern.
    ends = [name for name in names if name != module and (len(name) == size or name[-size - 1 : -size] == ".")]
    return [name for name in ends if re.fullmatch(re.escape(module).replace(r"\.", "."), name[-size:])]


def _is_plain(module: str) -> bool:
    return re.fullmatch(r"[\w.]+", module) is not None


def _exact(module: str) -> str:
    head, _, last = module.rpartition(".")
    return f"(?<=^{re.escape(head)}\\.){re.escape(last)}"
