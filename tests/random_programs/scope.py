"""What the pieces of random programs are made of.

Every piece fits every shape: it draws its choices from what the shape allows, and the data are cut or repeated to
the size that the weight asks for. So any list of pieces is a program, and a failing one can be shrunk freely.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

STACK = 2  # how many weights are in a stack that a scan or a vmap takes apart
WIDEST = 8  # data are cut to this width, and a weight to four times that


@dataclasses.dataclass
class Scope:
    """What a piece can draw on: choices, the data, and more parameters.

    Attributes:
      number: the number from which choices are taken, digit by digit.
      x: the data, of shape (T, D).
      more: gives a further parameter of the layer, of the shape asked for.
      said: the choices made, to be printed.
    """

    number: int
    x: Any
    more: Callable[[Sequence[int]], Any]
    said: list[Any] = dataclasses.field(default_factory=list)

    def pick(self, choices: Sequence[Any] | int) -> Any:
        choices = range(choices) if isinstance(choices, int) else choices
        self.number, at = divmod(self.number, len(choices))
        self.said.append(choices[at])
        return choices[at]

    def traced(self, below: int) -> Any:
        """An index below a bound that is known only when the program runs."""
        return jnp.where(self.x[0, 0] > 0.1, min(1, below - 1), 0).astype(jnp.int32)


def widths(x: Any, size: int) -> Any:
    """Cut or repeat the columns of the data."""
    return jnp.concatenate([x] * -(-size // x.shape[1]), 1)[:, :size]


def rows(x: Any, size: int) -> Any:
    """Cut or repeat the rows of the data."""
    return jnp.concatenate([x] * -(-size // x.shape[0]), 0)[:size]


def flat(y: Any) -> Any:
    """Return (T, ...) as (T, D), D within bounds."""
    return y.reshape(y.shape[0], -1)[:, :WIDEST]


def as_is(y: Any, x: Any) -> Any:
    return widths(rows(y, x.shape[0]), x.shape[1])


def table(*pieces: Callable) -> dict[str, Callable]:
    return {piece.__name__: piece for piece in pieces}
