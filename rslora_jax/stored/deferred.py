"""What a program does to a stored weight before it uses it, put off until then."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from rslora_jax.stored.form import Stored, dense, is_stored, like_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred(Stored):
    """The result of an operation on stored weights and arrays, which is formed where it is used.

    Attributes:
      sources: the operands; the first is stored.
      act: the operation, a function of a module and no closure, so that equal ones are traced once.
      others: its other arguments, hashable.
      whole, dtype: shape and dtype of the result when it was put off.
      leading: how many of its first axes are also those of every source, and stay as they are.
      depth: how many axes the first source had.
    """

    sources: tuple[Any, ...]
    act: Callable[..., Array] = dataclasses.field(metadata={"static": True})
    others: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    whole: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    leading: int = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    @property
    def lost(self) -> int:
        """How many axes of the stack were taken off since, as a scan takes them off; negative where some were added."""
        return self.depth - self.sources[0].ndim

    @property
    def stack(self) -> tuple[int, ...]:
        """What is left of the leading axes."""
        return tuple(self.sources[0].shape[: self.leading - self.lost])

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of the result behind the leading axes."""
        return self.whole[self.leading :]

    def dense(self) -> Array:
        def act(*arrays: Array) -> Array:
            ones = (1,) * self.lost
            out = self.act(*(array.reshape((*ones, *array.shape)) for array in arrays), *self.others)
            return out.reshape(out.shape[len(ones) :])

        for _ in range(-self.lost):
            act = jax.vmap(act)
        return act(*map(dense, self.sources))


def deferred(act: Callable[..., Array], sources: Sequence[Any], others: tuple[Any, ...], leading: int = 0) -> Deferred:
    """Put an operation off; arguments as the attributes of `Deferred`."""
    out = jax.eval_shape(lambda *arrays: act(*arrays, *others), *map(like_dense, sources))
    stacks = [len(source.stack) if is_stored(source) else 0 for source in sources]
    return Deferred(tuple(sources), act, others, out.shape, out.dtype, min(leading, *stacks), sources[0].ndim)
