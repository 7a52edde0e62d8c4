"""What the weights of a Flax model are called in a file, and how they lie there: a table, and how to read it.

A table maps a weight's path to the name of a parameter in the file, with `{i}` for the number of a layer. Where the
name has an `{i}` and the path has none, the path holds all layers, stacked on its first axis. A table that is the head
too is one weight in a file and two modules in PEFT: a row `"path@product"` names the head's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """Name a weight in a file, and say whether its matrix lies there the other way round, (out, in) for our (in, out).

    >>> NAMES = {"params/block_{i}/w": Weight("h.{i}.mlp.weight", transposed=True), "params/table": Weight("wte")}
    """

    name: str
    transposed: bool = False


# A bare name stands for a weight of which that is plain: vectors, what ends in "kernel" (Flax has it (in, out), PyTorch
# (out, in)) and what ends in "embedding" (the same in both).
Names = Mapping[str, str | Weight]


class Place(NamedTuple):
    """Where a file's parameter lies here.

    Attributes:
      path: of the weight.
      layer: its place on the first axis, where layers are stacked there.
      transposed: whether the file has it the other way round; None where the table does not say.
    """

    path: str
    layer: int | None
    transposed: bool | None = False

    def one(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of the one layer's weight that this is, from that of the whole."""
        return tuple(shape) if self.layer is None else tuple(shape[1:])

    def is_turned(self, ndim: int) -> bool:
        """Say whether the file has this weight, of so many axes in one layer, transposed.

        Raises:
          ValueError: the table of names does not say, or it is no matrix.
        """
        if self.transposed is None:
            raise ValueError(
                f"{self.path} is a matrix, and the table of names does not say which way round the file has it: "
                "give rslora_jax.interop.Weight(name, transposed=...) in place of the name"
            )
        if self.transposed and ndim != 2:
            raise ValueError(
                f"{self.path} has {ndim} axes in place of 2, and how a file has it transposed is not known: only "
                "matrices and what lies the same way round are read and written"
            )
        return self.transposed

    def to_file(self, weight: np.ndarray) -> np.ndarray:
        """Give one layer's weight as the file has it; errors as of `is_turned`."""
        return weight.T if self.is_turned(weight.ndim) else weight


def places(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Give the place of every parameter of a file that the weights of these paths and shapes hold.

    Raises:
      ValueError: a path is in no row of the table, or two places have one name.

    >>> names = {"params/layers/q/kernel": "model.layers.{i}.q.weight", "params/norm/scale": "model.norm.weight"}
    >>> found = places(names, {"params/layers/q/kernel": (2, 16, 16), "params/norm/scale": (16,)})
    >>> for name, place in found.items():
    ...     print(name, tuple(place))
    model.layers.0.q.weight ('params/layers/q/kernel', 0, True)
    model.layers.1.q.weight ('params/layers/q/kernel', 1, True)
    model.norm.weight ('params/norm/scale', None, False)
    """
    found: dict[str, Place] = {}
    for path, shape in shapes.items():
        for name, place in _of(names, path, shape):
            if name in found:
                raise ValueError(f"{path} and {found[name].path} would both be {name}: correct the table of names")
            found[name] = place
    return found


def is_looped(names: Names, paths: Iterable[str]) -> bool:
    """Say whether one of these weights has a layer's number in its path.

    >>> is_looped({"h_{i}/w": "h.{i}.weight", "h/w": "h.{i}.weight"}, ["h_3/w"])
    True
    """
    return any(found.groups() for path in paths for pattern in names if (found := _match(pattern, path)))


def row_of(names: Names, path: str) -> str | None:
    """Give the name that a table has for a path without layers; None where it has none.

    >>> row_of({"params/embed/embedding@product": Weight("lm_head.weight")}, "params/embed/embedding@product")
    'lm_head.weight'
    """
    row = next((row for pattern, row in names.items() if _match(pattern, path)), None)
    return row.name if isinstance(row, Weight) else row


def _of(names: Names, path: str, shape: tuple[int, ...]) -> Iterable[tuple[str, Place]]:
    for pattern, row in names.items():
        if (matched := _match(pattern, path)) is None:
            continue
        name = row if isinstance(row, str) else row.name
        is_stack = "{i}" in name and not matched.groups()
        is_transposed = _transposed(row, path, len(shape) - is_stack)
        if is_stack:
            return [(name.replace("{i}", str(n)), Place(path, n, is_transposed)) for n in range(shape[0])]
        number = matched[1] if matched.groups() else ""
        return [(name.replace("{i}", number), Place(path, None, is_transposed))]
    raise ValueError(f"{path} is in no row of the table of names: add one with its name in the file")


def _match(pattern: str, path: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), path)


def _transposed(row: str | Weight, path: str, ndim: int) -> bool | None:
    if not isinstance(row, str):
        return row.transposed
    plain = {"kernel": True, "embedding": False}
    return False if ndim < 2 else plain.get(path.rpartition("/")[2])
