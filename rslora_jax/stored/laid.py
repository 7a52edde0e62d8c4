"""Where the arrays of a stored weight lie on a mesh, and where the program wants them at their use."""

import dataclasses
import math
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from rslora_jax.stored.form import Stored, dense, is_stored, on_device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Laid(Stored):
    """A stored weight that lies in a certain way when it becomes dense: what has to move for that moves packed.

    Attributes:
      w: the weight.
      where: how it is to lie; the spec is of the axes behind the stack, which may lie as they do.
    """

    w: Stored
    where: NamedSharding = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.w.stack

    @property
    def inner(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.w.inner

    @property
    def dtype(self) -> Any:
        """That of the weight."""
        return self.w.dtype

    def dense(self) -> Array:
        depth = len(self.stack)
        whole = PartitionSpec(*(None,) * depth, *self.where.spec)
        shardings = stored_shardings(self.w, NamedSharding(self.where.mesh, whole))

        def lay(array: Array, to: NamedSharding) -> Array:
            free = (PartitionSpec.UNCONSTRAINED,) * min(depth, array.ndim)
            return lax.with_sharding_constraint(
                array, NamedSharding(to.mesh, PartitionSpec(*free, *to.spec[len(free) :]))
            )

        return dense(jax.tree.map(lay, on_device(self.w), shardings))


def laid(w: Stored, sharding: Any) -> Stored:
    """Return a stored weight that is to lie as a sharding of its shape says; where that says nothing of it, itself."""
    if not isinstance(sharding, NamedSharding) or PartitionSpec.UNCONSTRAINED in sharding.spec:
        return w
    return Laid(unlaid(w), NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(w.stack) :])))


def unlaid(w: Any) -> Any:
    """Return a weight that may lie in any way at its use."""
    return w.w if isinstance(w, Laid) else w


def stored_shardings(leaf: Any, sharding: Sharding) -> Any:
    """Return where the arrays of a weight lie, when the weight lies as `sharding` says; no block is cut.

    Each array is split as the weight is along the stack's axes, and along those of its own that hold a whole number of
    blocks for each device; along the others, and where it has other axes than the weight, it is whole.

    Args:
      leaf: a stored weight, of arrays or of `jax.ShapeDtypeStruct`; of an array the result is `sharding` itself.
      sharding: of the weight's shape; one without axes, such as that of a single device, is that of all its arrays.

    Returns:
      The same node of the pytree with a sharding in place of each array.

    >>> from jax.sharding import PartitionSpec
    >>> from rslora_jax.parallel import make_mesh
    >>> from rslora_jax.stored import nf4
    >>> w = jax.eval_shape(nf4, jax.ShapeDtypeStruct((256, 32), "float32"))
    >>> where = stored_shardings(w, NamedSharding(make_mesh("fsdp=-1"), PartitionSpec("fsdp", None)))
    >>> tuple(where.codes.spec), tuple(where.absmax.spec), tuple(where.nested.spec)
    (('fsdp', None), ('fsdp', None), ())
    """
    if not is_stored(leaf):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda array: sharding, leaf)
    depth, blocks = len(leaf.stack), leaf.blocks
    spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))

    def one(path: Any, array: Any) -> NamedSharding:
        own = blocks.get(_field(path), ())  # how many places along each axis behind the stack are of one block
        counts = [size // block for size, block in zip(array.shape, (1,) * depth + own, strict=False)]
        split = [dividing(sharding.mesh, count, axes) for count, axes in zip(counts, spec, strict=False)]
        return NamedSharding(sharding.mesh, PartitionSpec(*split), memory_kind=sharding.memory_kind)

    return jax.tree_util.tree_map_with_path(one, leaf)


def sharding_of(leaf: Any) -> Sharding:
    """Return where a weight lies: of one in a form of its own, along each axis as the arrays that are split there."""
    if not is_stored(leaf):
        return leaf.sharding
    shardings = {_field(path): array.sharding for path, array in jax.tree_util.tree_leaves_with_path(leaf)}
    first = next(iter(shardings.values()))
    if not isinstance(first, NamedSharding):
        return first

    def axes(axis: int) -> Any:
        names = shardings if axis < len(leaf.stack) else leaf.blocks
        found = [tuple(shardings[name].spec)[axis : axis + 1] for name in names]
        return next((names for of in found for names in of if names is not None), None)

    return NamedSharding(first.mesh, PartitionSpec(*map(axes, range(leaf.ndim))), memory_kind=first.memory_kind)


def dividing(mesh: Mesh | AbstractMesh, size: int, axes: Any) -> Any:
    """Return the mesh axes of an array's axis that there are and that divide its size."""
    names = [axes] if isinstance(axes, str) else list(axes or ())
    names = [name for name in names if name in mesh.shape]
    if size % math.prod(mesh.shape[name] for name in names):
        return None
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _field(path: Any) -> str:
    """Return the name of the field that a path into a stored weight starts with."""
    return jax.tree_util.keystr(path[:1], simple=True)
