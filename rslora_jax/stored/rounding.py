"""A format by its name and options, as commands and files name it."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from rslora_jax.shown import quoted
from rslora_jax.stored.float8 import float8
from rslora_jax.stored.form import Stored
from rslora_jax.stored.int8 import int8
from rslora_jax.stored.nf4 import BLOCK, nf4

FORMATS = ("nf4", "int8", "float8")


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a weight is put into fewer bits.

    Attributes:
      format: the name of the format, one of `FORMATS`.
      block: of NF4, how many numbers have one scale.
      double: of NF4, whether the scales are stored in 8 bits themselves.
    """

    format: str
    block: int = BLOCK
    double: bool = True

    def __call__(self, weight: Any, axes: Sequence[int], depth: int = 0) -> Stored:
        """Round a weight.

        Args:
          weight: an array (*stack, *inner) of numbers that are finite.
          axes: the in-axes of `inner`: each place along the others is an out channel.
          depth: how many axes the stack has.
        """
        if self.format != "nf4":
            return (int8 if self.format == "int8" else float8)(weight, tuple(axes), depth)
        whole = [axis for axis in axes if weight.shape[depth + axis] % self.block == 0]
        return nf4(weight, (whole or list(axes))[-1], depth, block=self.block, double=self.double)


def rounding(format: str, *, block: int | None = None, double: bool = True) -> Rounding:
    """Return how a format rounds, by its name.

    Args:
      format: of `FORMATS`.
      block: of NF4, how many numbers have one scale, an even number: by default 64.
      double: of NF4, whether the scales are stored in 8 bits themselves.

    Raises:
      ValueError: there is no such format, or it has no such option.

    >>> rounding("nf4", block=128)
    Rounding(format='nf4', block=128, double=True)
    """
    if format not in FORMATS:
        close = difflib.get_close_matches(str(format).lower(), FORMATS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use {', '.join(FORMATS)}"
        raise ValueError(f"the format {quoted(format)} is not known: {hint}")
    if format != "nf4" and (block is not None or not double):
        raise ValueError(f"{format} has one scale for each out channel, and no blocks: leave `block` and `double` out")
    block = BLOCK if block is None else block
    if isinstance(block, bool) or not isinstance(block, int) or block < 2 or block % 2:
        raise ValueError(f"block={quoted(block)} is no size of blocks: give an even number of 2 or more, such as 64")
    return Rounding(format, block, double)
