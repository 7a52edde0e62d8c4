"""What each primitive does to a view: leave it a weight, or use it where it meets data."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from rslora_jax.stored.form import is_stored
from rslora_jax.stored.laid import laid, unlaid
from rslora_jax.transform import calls, collectives, compat, joins, renames
from rslora_jax.transform.convolution import convolution
from rslora_jax.transform.dot import dot
from rslora_jax.transform.interpreter import Rule, Walk
from rslora_jax.transform.lookup import lookup
from rslora_jax.transform.picks import pick_of, slice_as_pick, take
from rslora_jax.transform.ragged import ragged
from rslora_jax.transform.uses import LOOKUP, PRODUCT, at_use
from rslora_jax.transform.views import View, spans

# Weights that stay weights.


def _renaming(act: Callable[..., View | None]) -> Rule:
    """Return the rule of a primitive that acts on one weight: `act` takes it and the equation's parameters."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        view, *rest = values
        if not isinstance(view, View) or any(isinstance(v, View) for v in rest):
            return None
        out = act(view, eqn.params, *rest)
        return None if out is None else [out]

    return rule


def _each(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Bind a primitive that has no regard to shapes to the weight and to all parts."""
    (view,) = values
    return [renames.untouched(view, lambda array: compat.bind(eqn, array)[0])]


def _reshape(view: View, params: dict[str, Any]) -> View | None:
    # `lax.reshape` can take the axes in another order first: vmap does so with the kernels of a convolution.
    if params["dimensions"] is not None:
        view = renames.transpose(view, params["dimensions"])
    return renames.reshape(view, params["new_sizes"])


def _cast(view: View, params: dict[str, Any]) -> View | None:
    if not jnp.issubdtype(params["new_dtype"], jnp.inexact):
        return None
    if jnp.issubdtype(view.dtype, jnp.complexfloating) > jnp.issubdtype(params["new_dtype"], jnp.complexfloating):
        return None  # the imaginary part of a factor counts in the product with the other's
    # Only the first cast waits: a second one must see the base as the first has rounded it.
    w = view.w if view.dtype == view.w.dtype else renames.cast(view.w, view.dtype)
    return dataclasses.replace(view, w=w, dtype=jnp.dtype(params["new_dtype"]))


def _dynamic_slice(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Cut a weight where data say; of a table, a row is looked up at once, with its update."""
    view, *starts = values
    if not isinstance(view, View) or any(isinstance(v, View) for v in starts) or len(starts) != len(view.shape):
        return None
    sizes = eqn.params["slice_sizes"]
    shape, table = view.shape, _is_table(walk, view)
    rows = [n for n in _own_axes(view) if sizes[n] != shape[n]]
    if not table or not rows:
        return [renames.dynamic_slice(view, starts, sizes)]
    view = _looked_up(view)
    others = renames.dynamic_slice(view, starts, [shape[n] if n == rows[0] else size for n, size in enumerate(sizes)])
    pick, index = slice_as_pick(rows[0], starts[rows[0]], others.shape, sizes)
    return walk.use(others, lookup(others, pick, index, walk.target), index)


def _looked_up(view: View) -> View:
    """Return a view as a look-up has it: a stored one gives its rows from where they lie."""
    view = at_use(view, LOOKUP)
    return dataclasses.replace(view, w=unlaid(view.w))


def _is_table(walk: Walk, view: View) -> bool:
    """Say whether picking rows of a weight is its use: of an adapted table, or of a stored weight without adapter."""
    return bool(walk.tables.intersection(view.sites)) or (is_stored(view.w) and not view.sites)


def _own_axes(view: View) -> list[int]:
    """Return the axes of a weight that are none of its stack: not all factors span them."""
    if view.factors:
        return [n for n in range(len(view.shape)) if not all(spans(view, factor)[n] for factor in view.factors)]
    return [*range(len(view.w.stack), len(view.shape))] if is_stored(view.w) else []


def _split(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    return _cut(values[0], eqn.params["axis"], eqn.params["sizes"])


def _cut(view: View, axis: int, sizes: Sequence[int]) -> list[View]:
    """Cut a weight along an axis into parts of given sizes."""
    parts, start = [], 0
    for size in sizes:
        starts = [start if n == axis else 0 for n in range(len(view.shape))]
        limits = [start + size if n == axis else full for n, full in enumerate(view.shape)]
        parts.append(renames.slice_axes(view, starts, limits, None))
        start += size
    return parts


def _concatenate(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    view = joins.concatenate(values, eqn.params["dimension"])
    return None if view is None else [view]


def _stack(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    axis = eqn.params["axis"]

    def widen(value: Any) -> Any:
        if not isinstance(value, View):
            return jnp.expand_dims(value, axis)
        shape = (*value.shape[:axis], 1, *value.shape[axis:])
        return renames.broadcast(value, shape, [n for n in range(len(shape)) if n != axis])

    view = joins.concatenate([widen(v) for v in values], axis)
    return None if view is None else [view]


def _unstack(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    (view,), axis = values, eqn.params["axis"]
    parts = _cut(view, axis, [1] * view.shape[axis])
    return [renames.squeeze(part, [axis]) for part in parts]


def _tile(view: View, params: dict[str, Any]) -> View | None:
    out: View | None = view
    for axis, times in enumerate(params["reps"]):
        out = joins.concatenate([out] * times, axis) if out is not None and times > 1 else out
    return out


def _multiply(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    left, right = values
    if isinstance(left, View) == isinstance(right, View):
        return None
    view, by = (left, right) if isinstance(left, View) else (right, left)
    out = renames.scale(view, jnp.asarray(by), operator.mul)
    return None if out is None else [out]


def _divide(view: View, params: dict[str, Any], by: Array) -> View | None:
    return renames.scale(view, jnp.asarray(by), operator.truediv)


def _add(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    left, right = values
    view, by = (left, right) if isinstance(left, View) else (right, left)
    if isinstance(by, View):
        both = joins.total(left, right)
        if both is not None:
            return [both]
    out = renames.shift(view, jnp.asarray(walk.array(by, "sum of two weights")), operator.add)
    return None if out is None else [out]


def _subtract(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    left, right = values
    if isinstance(right, View):
        return _add(walk, eqn, [left, renames.negate(right)])
    out = renames.shift(left, jnp.asarray(right), operator.sub)
    return None if out is None else [out]


def _optimization_barrier(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    # A barrier orders computed values; a weight is an input and needs none.
    fenced = iter(compat.bind(eqn, *(v for v in values if not isinstance(v, View))))
    return [v if isinstance(v, View) else next(fenced) for v in values]


def _constrain_sharding(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    # The constraint is on an array of the weight's shape; the factors are left to the compiler.
    # That on a stored weight is kept for its use.
    (view,) = values
    if is_stored(view.w):
        return [dataclasses.replace(view, w=laid(view.w, eqn.params["sharding"]))]
    (w,) = compat.bind(eqn, view.w)
    return [dataclasses.replace(view, w=w)]


def _reshard(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Lay a weight in another way, and its factors with it along the axes that they span."""
    (view,) = values
    if is_stored(view.w):
        return None
    return [renames.lay(view, compat.bind(eqn, view.w)[0])]


def _device_put(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Bring a weight to other memory, as a base that waits on the host; factors that lie elsewhere follow it."""
    if len(values) > 1:
        return None
    (view,) = values
    w = jax.tree.map(lambda array: compat.bind(eqn, array)[0], view.w)
    space = jax.typeof(jax.tree.leaves(w)[0]).memory_space

    def own(part: Array) -> Array:
        return part if jax.typeof(part).memory_space == space else jax.device_put(part, space)

    return [view.with_parts(w, [own(part) for part in view.parts])]


# Weights that meet data.


def _dot_general(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view in a product, whichever side it stands on and whichever axes are contracted."""
    lhs, rhs = values
    if isinstance(lhs, View) and isinstance(rhs, View):
        lhs = walk.array(lhs, "dot_general of two weights")
    weight_left = isinstance(lhs, View)
    view, x = (lhs, rhs) if weight_left else (rhs, lhs)
    view = at_use(view, PRODUCT)
    return walk.use(view, dot(view, x, weight_left, eqn.params, walk.target), x)


def _conv_general_dilated(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view as a kernel: one factor keeps the window, the other is pointwise."""
    x, view = walk.array(values[0], "convolution of a weight"), values[1]
    if not isinstance(view, View):
        return compat.bind(eqn, x, view)
    view = at_use(view, PRODUCT)
    return walk.use(view, convolution(view, eqn.params, walk.target), x)


def _ragged_dot_general(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view as experts of which every run of rows meets one."""
    x, view, *sizes = values
    if not isinstance(view, View) or isinstance(x, View):
        return None
    view = at_use(view, PRODUCT)
    return walk.use(view, ragged(view, x, eqn.params, sizes[0], walk.target), x, *sizes)


def _gather(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Pick rows, columns or matrices of a weight; of a table, the rows are looked up at once, with their update."""
    view, indices = values
    if not isinstance(view, View) or isinstance(indices, View):
        return None
    pick = pick_of(eqn.params, view.shape)
    if pick is None:
        return None
    if _is_table(walk, view) and pick.row in _own_axes(view):
        view = _looked_up(view)
        return walk.use(view, lookup(view, pick, indices, walk.target), indices)
    picked = take(view, pick, indices)
    return None if picked is None else [picked]


RULES: dict[compat.Primitive, Rule] = {
    primitives.transpose_p: _renaming(lambda view, p: renames.transpose(view, p["permutation"])),
    primitives.reshape_p: _renaming(_reshape),
    primitives.squeeze_p: _renaming(lambda view, p: renames.squeeze(view, p["dimensions"])),
    primitives.broadcast_in_dim_p: _renaming(
        lambda view, p: renames.broadcast(view, p["shape"], p["broadcast_dimensions"])
    ),
    primitives.rev_p: _renaming(lambda view, p: renames.reverse(view, p["dimensions"])),
    primitives.pad_p: _renaming(lambda view, p, value: renames.pad(view, value, p["padding_config"])),
    primitives.slice_p: _renaming(
        lambda view, p: renames.slice_axes(view, p["start_indices"], p["limit_indices"], p["strides"])
    ),
    primitives.dynamic_slice_p: _dynamic_slice,
    lax.split_p: _split,
    primitives.concatenate_p: _concatenate,
    lax.stack_p: _stack,
    lax.unstack_p: _unstack,
    lax.tile_p: _renaming(_tile),
    primitives.convert_element_type_p: _renaming(_cast),
    primitives.copy_p: _renaming(lambda view, p: view),
    primitives.neg_p: _renaming(lambda view, p: renames.negate(view)),
    primitives.mul_p: _multiply,
    primitives.div_p: _renaming(_divide),
    primitives.add_p: _add,
    primitives.add_jaxvals_p: _add,
    primitives.sub_p: _subtract,
    primitives.stop_gradient_p: _each,
    primitives.name_p: _each,
    compat.pvary_p: _each,
    lax.optimization_barrier_p: _optimization_barrier,
    primitives.sharding_constraint_p: _constrain_sharding,
    primitives.dot_general_p: _dot_general,
    primitives.conv_general_dilated_p: _conv_general_dilated,
    compat.ragged_dot_general_p: _ragged_dot_general,
    primitives.gather_p: _gather,
    primitives.all_gather_p: collectives.all_gather,
    compat.all_gather_invariant_p: collectives.all_gather,
    primitives.ppermute_p: collectives.ppermute,
    compat.reshard_p: _reshard,
    primitives.device_put_p: _device_put,
    **calls.RULES,
}
