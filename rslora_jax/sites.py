"""Sites: the weights that get adapters, found by how the program uses them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted weight.

    Attributes:
      path: its pytree path, joined with "/".
      shape: its shape.
      in_axes, out_axes, stack_axes: its axes that are summed over (or indexed), free, and stacked.
      kind: "linear", "expert" (a stack used in one batched product), "convolution" or "embedding".
      rank, alpha, gamma: this adapter's own; gamma is the whole factor on A B.
      fallbacks: the uses that have no low-rank form, by primitive; there the weight is materialised.
    """

    path: str
    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    kind: str
    rank: int
    alpha: float
    gamma: float
    fallbacks: tuple[str, ...] = ()

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[n] for n in axes)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """(*stack, *in, rank)"""
        return (*self.sizes(self.stack_axes), *self.sizes(self.in_axes), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """(*stack, rank, *out)"""
        return (*self.sizes(self.stack_axes), self.rank, *self.sizes(self.out_axes))

    @property
    def in_size(self) -> int:
        return math.prod(self.sizes(self.in_axes))

    @property
    def out_size(self) -> int:
        return math.prod(self.sizes(self.out_axes))

    @property
    def num_parameters(self) -> int:
        return math.prod(self.a_shape) + math.prod(self.b_shape)


def path_name(path: Sequence[Any]) -> str:
    """Join a pytree path with "/".

    >>> [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})]
    ['layers/0/kernel']
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path, in its order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
