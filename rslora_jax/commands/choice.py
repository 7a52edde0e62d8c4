"""The adapters of `rslora generate --adapters`, among which each prompt has its own, in one program."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASE = "base"  # what a prompt names that is to have no adapter


class Asked(NamedTuple):
    """A prompt, and which adapter it asks for.

    Attributes:
      prompt: text, or the turns of a chat.
      adapter: the adapter's name, `BASE` for none; None where the prompt does not say.
      where: its place in a file, for what is to be said of it.
    """

    prompt: Any
    adapter: str | None = None
    where: str = "the prompt"


def folders_by_name(text: str) -> dict[str, str]:
    """Read folders with commas between them, each by its own name or as NAME=FOLDER.

    Raises:
      ValueError: two have one name, or a name stands for the base.

    >>> folders_by_name("runs/sql, py=runs/python/checkpoints/40")
    {'sql': 'runs/sql', 'py': 'runs/python/checkpoints/40'}
    """
    found: dict[str, str] = {}
    for part in map(str.strip, text.split(",")):
        name, is_named, folder = (piece.strip() for piece in part.partition("="))
        if not is_named or "/" in name or Path(part).exists():
            name, folder = _own_name(part), part
        if not name or not folder:
            raise ValueError(
                f"--adapters {text} has an empty part: give FOLDER or NAME=FOLDER, with commas between them"
            )
        if name == BASE:
            raise ValueError(
                f"--adapters: {BASE} is the name of no adapter at all: give {folder} another, NAME={folder}"
            )
        if name in found:
            raise ValueError(f"--adapters: {found[name]} and {folder} are both named {name}: give one NAME=FOLDER")
        found[name] = folder
    return found


def _own_name(folder: str) -> str:
    """Return the name of a folder; that of a checkpoint is its run's."""
    whole = Path(folder).absolute()
    return whole.parent.parent.name if whole.parent.name == "checkpoints" else whole.name


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which adapters there are, by name, and which one a prompt has that names none."""

    folders: Mapping[str, str]
    default: str

    @classmethod
    def of(cls, adapters: str, default: str | None) -> Choice:
        """Read the flags --adapters and --adapter.

        Raises:
          ValueError: they name no adapters, or not these.
        """
        folders = folders_by_name(adapters)
        choice = cls(folders, default or next(iter(folders)))
        choice.number(Asked("", default, "--adapter"))
        return choice

    def name(self, asked: Asked) -> str:
        """Return the name of the adapter that a prompt has."""
        return self.default if asked.adapter is None else asked.adapter

    def number(self, asked: Asked) -> int:
        """Return the number of the adapter that a prompt has; -1 for none.

        Raises:
          ValueError: there is none of this name; says which come close.
        """
        names, name = [*self.folders], self.name(asked)
        if name == BASE:
            return -1
        if name not in names:
            known = {one.lower(): one for one in [BASE, *names]}
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(names)} and {BASE}"
            raise ValueError(f"{asked.where} names an adapter {name!r} that --adapters does not have: {hint}")
        return names.index(name)


def program_of(loaded: Any) -> tuple[Callable[..., Any], Callable[[Sequence[int]], Any]]:
    """Return (apply, variables) of several runs, by which each row of a batch has an adapter of its own.

    `apply(variables(numbers), tokens, positions, cache=cache)` is compiled once, whatever the numbers are.

    Args:
      loaded: of `runs.load_runs`.

    Raises:
      ValueError: a run has other weights of the base too.
    """
    import numpy as np

    from rslora_jax.models.attention import CACHE_ROWS
    from rslora_jax.several import per_example, stack

    for run in loaded.runs:
        if run.variables is not loaded.variables and not _equal(run.variables, loaded.variables):
            raise ValueError(
                f"{run.name} replaces weights of the base, which all adapters share here: let it answer alone"
            )
    lora, stacked = stack([(run.lora, run.adapters) for run in loaded.runs], loaded.variables)
    each = per_example(lora, 0, (0, CACHE_ROWS), kwarg_axes={"cache": CACHE_ROWS})

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        return each(*variables, *args, **kwargs)

    def variables(numbers: Sequence[int]) -> Any:
        return loaded.variables, stacked, np.asarray(numbers, np.int32)

    return apply, variables


def _equal(one: Any, other: Any) -> bool:
    """Say whether two pytrees hold the same numbers."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
