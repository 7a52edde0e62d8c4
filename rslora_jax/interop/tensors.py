"""What a tensor in a file is to a reader, of whatever format the file is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np


class Tensor(Protocol):
    """A tensor in a file, of any format, that can be read some rows at a time."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def name(self) -> str:
        """Its name there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which its rows are read."""

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows `first` to `stop` along the first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that a weight is made of, and how they lie.

    Attributes:
      tensors: one, or one for each layer of a stack.
      is_stack: whether it is a stack.
      is_turned: whether files have each matrix the other way round.
      is_in_layers: whether it is of a layer, or of all, and not of what is before or behind them.
    """

    tensors: tuple[Tensor, ...]
    is_stack: bool
    is_turned: bool
    is_in_layers: bool
