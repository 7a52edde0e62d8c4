"""The one thing that the transform knows of a weight that is no array: it stands for one."""

import math
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array


class Stored:
    """A weight held in a form of its own, that stands for an array: what every format in this room is a kind of.

    A format is a dataclass, registered as a pytree node (`jax.tree_util.register_dataclass`), whose arrays all have
    the stack's axes first; what lies behind these in each is the format's own. So what cuts or moves the stack alone,
    as a scan over layers does, is done to the arrays as they are. All else waits until the weight is used: there
    it becomes dense, and again in the backward pass, and is not kept between.

    A format defines `stack`, the sizes of the axes that all its arrays have in front; `inner`, the shape
    of the array behind these; `dtype`, that of the array; and `dense()`, which makes the array, for any stack. One
    whose arrays have the array's axes in their order, divided into blocks, says so in `blocks`; one of several
    kinds that a class has gives its name in `format`.
    """

    if TYPE_CHECKING:  # a property here would be in the way of a field of the same name

        @property
        def stack(self) -> tuple[int, ...]:
            """The sizes of the axes that all its arrays have in front."""

        @property
        def inner(self) -> tuple[int, ...]:
            """The shape of the array behind the stack."""

        @property
        def dtype(self) -> Any:
            """The dtype of the array."""

    def dense(self) -> Array:
        """Return the array that it stands for."""
        raise NotImplementedError

    def rows(self, at: Array) -> Array | None:
        """Return `dense()[at]` without the other rows, of a weight without a stack; None where a format cannot.

        Args:
          at: integers (n,) that are rows.
        """
        return None

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        """For each of its arrays that has the axes of `inner`, how many entries along each are of one block.

        What is of one block stays on one device. An array that is not here is whole on every device.
        """
        return {}

    @property
    def format(self) -> str:
        """The name of the format, that a base is known by."""
        return type(self).__name__

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        return (*self.stack, *self.inner)

    @property
    def ndim(self) -> int:
        """How many axes that array has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers that array has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays that it is made of."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


def is_stored(node: Any) -> TypeGuard[Stored]:
    """Say whether a node of a pytree is one weight in a form of its own."""
    return isinstance(node, Stored)


def dense(weight: Any) -> Array:
    """Return a weight as an array; of a stored one, in the device's memory, wherever it waits."""
    return on_device(weight).dense() if is_stored(weight) else weight


def on_device(weight: Any) -> Any:
    """Return a weight in the device's memory: a stored one comes packed from where it waits, as on the host."""

    def one(array: Any) -> Any:
        return array if memory_of(array) == jax.memory.Space.Device else jax.device_put(array, jax.memory.Space.Device)

    return jax.tree.map(one, weight) if is_stored(weight) else weight


def memory_of(weight: Any) -> Any:
    """Return the kind of memory in which a weight's arrays lie."""
    return jax.typeof(jax.tree.leaves(weight)[0]).memory_space


def element(weight: Any, n: int) -> Any:
    """Return one element of a weight's first axis; of one that is stored, in its form, where that axis is a stack."""
    if is_stored(weight) and not weight.stack:
        return dense(weight)[n]
    return jax.tree.map(lambda array: array[n], weight)


def like_dense(weight: Any) -> Any:
    """Return the shape and dtype of the array that a weight stands for; what is no stored weight is returned."""
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype) if is_stored(weight) else weight
