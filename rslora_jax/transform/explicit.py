"""Meshes with explicit axes, where the type of an array says how it is cut, and every operation must keep to it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

from rslora_jax.stored.form import dense, is_stored


def explicit_mesh(*arrays: Any) -> Any:
    """Return the mesh of the first array that lies on one with explicit axes, or None."""
    meshes = (jax.typeof(leaf).sharding.mesh for array in arrays for leaf in jax.tree.leaves(array))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def type_of_weight(w: Any) -> Any:
    """Return the type of a weight, or of the array that a stored one stands for."""
    return type_of(dense, w) if is_stored(w) else jax.typeof(w)


def _cut(of: Any) -> tuple[Any, ...]:
    """Return for each axis of an array the mesh axes along which its type, which is given, says that it is cut."""
    return (*of.sharding.spec, *(None,) * (of.ndim - len(of.sharding.spec)))


def lay_factor(factor: Array, spanned: Sequence[bool], like: Any) -> Array:
    """Lay a factor as its weight lies along the axes that it spans; its rank stays as it is, where it can."""
    # Op by op, the weight itself knows its devices.
    first, whole = jax.tree.leaves(like)[0], type_of_weight(like)
    where = (jax.typeof(first) if isinstance(first, jax.core.Tracer) else first).sharding
    if not isinstance(where, NamedSharding):  # a weight on one device goes to the mesh of whatever it meets
        return factor
    mesh = where.mesh
    own = tuple(of if there else None for of, there in zip(_cut(whole), spanned, strict=True))
    now = _cut(jax.typeof(factor))
    rank = now[-1]
    free = set(mesh.explicit_axes) - {name for of in own for name in _names(of)}
    wanted = (*own, rank if _names(rank) <= free else None)
    same_mesh = jax.typeof(factor).sharding.mesh == whole.sharding.mesh
    return factor if same_mesh and now == wanted else reshard(factor, NamedSharding(mesh, P(*wanted)))


def _names(of: Any) -> set[str]:
    """Return the mesh axes in an entry of a partition spec."""
    return set(of) if isinstance(of, tuple) else set() if of is None else {of}


def type_of(act: Callable[..., Array], *operands: Any) -> Any:
    """Return the type of what a function returns."""
    found = []
    jax.eval_shape(lambda *operands: found.append(jax.typeof(act(*operands))), *operands)
    return found[0]


def by_compiler(act: Callable[..., Array], where: NamedSharding, *operands: Array) -> Array:
    """Leave to the compiler how arrays lie within `act`, and say how its result does."""
    return auto_axes(act, axes=where.mesh.explicit_axes, out_sharding=where)(*operands)
