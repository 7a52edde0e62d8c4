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
    """The tensors that a weight is made of, one for each layer where it holds several, and how they lie."""

    tensors: tuple[Tensor, ...]
    is_stack: bool
    is_turned: bool
