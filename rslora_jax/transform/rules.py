"""What each primitive does to a view: leave it a weight, or use it where it meets data."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from rslora_jax.transform import calls, compat, joins, renames
from rslora_jax.transform.convolution import convolution
from rslora_jax.transform.dot import dot
from rslora_jax.transform.interpreter import Rule, Walk, uses
from rslora_jax.transform.ragged import ragged
from rslora_jax.transform.views import View, spans

# Weights that stay weights.


def renaming(act: Callable[..., View | None]) -> Rule:
    """Return the rule of a primitive that acts on one weight: `act` takes it and the equation's parameters."""

    def rule(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
        view, *rest = values
        if not isinstance(view, View) or any(isinstance(v, View) for v in rest):
            return None
        out = act(view, eqn.params, *rest)
        return None if out is None else [out]

    return rule


def each(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Bind a primitive that has no regard to shapes to the weight and to both factors."""
    (view,) = values
    return [renames.rename(view, lambda array, spanned: compat.bind(eqn, array)[0], view.axes)]


def reshape(view: View, params: dict[str, Any]) -> View | None:
    # `lax.reshape` can take the axes in another order first: vmap does so with the kernels of a convolution.
    if params["dimensions"] is not None:
        view = renames.transpose(view, params["dimensions"])
    return renames.reshape(view, params["new_sizes"])


def cast(view: View, params: dict[str, Any]) -> View | None:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        return None
    # Only the first cast waits: a second one must see the base as the first has rounded it.
    w = view.w if view.dtype == view.w.dtype else view.base
    return dataclasses.replace(view, w=w, dtype=jnp.dtype(params["new_dtype"]))


def dynamic_slice(view: View, params: dict[str, Any], *starts: Array) -> View | None:
    return renames.dynamic_slice(view, starts, params["slice_sizes"]) if len(starts) == len(view.shape) else None


def split(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    return cut(values[0], eqn.params["axis"], eqn.params["sizes"])


def cut(view: View, axis: int, sizes: Sequence[int]) -> list[View]:
    """Cut a weight along an axis into parts of given sizes."""
    parts, start = [], 0
    for size in sizes:
        starts = [start if n == axis else 0 for n in range(len(view.shape))]
        limits = [start + size if n == axis else full for n, full in enumerate(view.shape)]
        parts.append(renames.slice_axes(view, starts, limits, None))
        start += size
    return parts


def concatenate(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    view = joins.concatenate(values, eqn.params["dimension"])
    return None if view is None else [view]


def stack(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    axis = eqn.params["axis"]

    def widen(value: Any) -> Any:
        if not isinstance(value, View):
            return jnp.expand_dims(value, axis)
        shape = (*value.shape[:axis], 1, *value.shape[axis:])
        return renames.broadcast(value, shape, [n for n in range(len(shape)) if n != axis])

    view = joins.concatenate([widen(v) for v in values], axis)
    return None if view is None else [view]


def unstack(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    (view,), axis = values, eqn.params["axis"]
    parts = cut(view, axis, [1] * view.shape[axis])
    return [renames.squeeze(part, [axis]) for part in parts]


def tile(view: View, params: dict[str, Any]) -> View | None:
    out: View | None = view
    for axis, times in enumerate(params["reps"]):
        out = joins.concatenate([out] * times, axis) if out is not None and times > 1 else out
    return out


def multiply(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    left, right = values
    if isinstance(left, View) == isinstance(right, View):
        return None
    view, by = (left, right) if isinstance(left, View) else (right, left)
    out = renames.scale(view, jnp.asarray(by), lambda w, by: w * by)
    return None if out is None else [out]


def divide(view: View, params: dict[str, Any], by: Array) -> View | None:
    return renames.scale(view, jnp.asarray(by), lambda w, by: w / by)


def add(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    left, right = values
    view, by = (left, right) if isinstance(left, View) else (right, left)
    out = renames.shift(view, jnp.asarray(walk.array(by, "sum of two weights")), lambda w, by: w + by)
    return None if out is None else [out]


def subtract(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    left, right = values
    if not isinstance(left, View):
        return add(walk, eqn, [left, renames.negate(right)])
    out = renames.shift(left, jnp.asarray(walk.array(right, "sum of two weights")), lambda w, by: w - by)
    return None if out is None else [out]


def optimization_barrier(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    # A barrier orders computed values; a weight is an input and needs none.
    fenced = iter(compat.bind(eqn, *(v for v in values if not isinstance(v, View))))
    return [v if isinstance(v, View) else next(fenced) for v in values]


def constrain_sharding(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    # The constraint is on an array of the weight's shape; the factors are left to the compiler.
    (view,) = values
    (w,) = compat.bind(eqn, view.w)
    return [dataclasses.replace(view, w=w)]


# Weights that meet data.


def use(walk: Walk, eqn: compat.Eqn, view: Any, kind: str, contracted: Any, batch: Any, data: Any) -> None:
    """Report the use of a view. What was computed from weights (latent queries) is no weight where it meets one."""
    if isinstance(view, View) and not (view.opaque and not compat.is_tracer(data)):
        for found in uses(view, kind, contracted, batch, eqn):
            walk.on_use(found)


def dot_general(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view in a product, whichever side it stands on and whichever axes are contracted."""
    lhs, rhs = values
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    use(walk, eqn, lhs, "product", lhs_contracted, lhs_batch, rhs)
    use(walk, eqn, rhs, "product", rhs_contracted, rhs_batch, lhs)
    if isinstance(lhs, View) and isinstance(rhs, View):
        lhs = walk.array(lhs, "dot_general of two weights")
    weight_left = isinstance(lhs, View)
    view, x = (lhs, rhs) if weight_left else (rhs, lhs)
    if view.a is None:
        return compat.bind(eqn, *((view.base, x) if weight_left else (x, view.base)))
    how = dot(view, x, weight_left, eqn.params)
    return None if how is None else [walk.product(how[0], x, view.w, *how[1:])]


def conv_general_dilated(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view as a kernel: one factor keeps the window, the other is pointwise."""
    x, view = walk.array(values[0], "convolution of a weight"), values[1]
    if not isinstance(view, View):
        return compat.bind(eqn, x, view)
    _, *rest = eqn.params["dimension_numbers"].rhs_spec
    use(walk, eqn, view, "convolution", rest, (), x)
    if view.a is None:
        return compat.bind(eqn, x, view.base)
    how = convolution(view, eqn.params)
    return None if how is None else [walk.product(how[0], x, view.w, *how[1:])]


def ragged_dot_general(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view as experts of which every run of rows meets one."""
    x, view, *sizes = values
    if not isinstance(view, View) or isinstance(x, View):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    use(walk, eqn, view, "product", contracted, (*batch, *numbers.rhs_group_dimensions), x)
    if view.a is None:
        return compat.bind(eqn, x, view.base, *sizes)
    how = ragged(view, x, eqn.params)
    return None if how is None else [walk.product(how[0], x, view.w, *how[1:], *sizes)]


def gather(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view as a table of rows, or pick matrices from a stack.

    Rows are looked up in the factor that spans them, and those few are multiplied by the other.
    """
    view, indices = values
    if not isinstance(view, View):
        return None
    numbers = eqn.params["dimension_numbers"]
    whole = tuple(eqn.params["slice_sizes"])
    looked_up = [n for n, (size, full) in enumerate(zip(whole, view.shape, strict=True)) if size != full]
    looked_up = looked_up or list(numbers.collapsed_slice_dims)
    fill = eqn.params["fill_value"]
    if (
        len(looked_up) != 1
        or tuple(numbers.start_index_map) != tuple(looked_up)
        or tuple(numbers.collapsed_slice_dims) != tuple(looked_up)
        or numbers.operand_batching_dims
        or (fill not in (None, 0) and fill == fill)
    ):
        return None
    (row,) = looked_up
    use(walk, eqn, view, "lookup", [row], (), indices)

    def pick(array: Array, sizes: list[int]) -> Array:
        """Gather slices of some sizes; a rank may follow the weight's own axes."""
        places = indices.ndim - 1 + array.ndim - 1
        offset = (*numbers.offset_dims, *range(indices.ndim - 1 + len(view.shape) - 1, places))
        return lax.gather(
            array,
            indices,
            lax.GatherDimensionNumbers(offset, (row,), (row,)),
            sizes,
            indices_are_sorted=eqn.params["indices_are_sorted"],
            unique_indices=eqn.params["unique_indices"],
            mode=eqn.params["mode"],
            fill_value=fill,
        )

    rest = [n for n in range(len(view.shape)) if n != row]
    if view.a is None and len(rest) < 2:
        return compat.bind(eqn, view.base, indices)
    if all(f is None or spans(view, f)[row] for f in (view.a, view.b)):
        return [renames.take(view, row, numbers.offset_dims, pick)]
    (table, other) = (view.a, view.b) if spans(view, view.a)[row] else (view.b, view.a)
    if any(spans(view, table)[n] and view.shape[n] > 1 for n in rest):
        return None
    (y,) = compat.bind(eqn, view.base, indices)
    rows = pick(table, [1] * len(view.shape) + [table.shape[-1]])
    rows = view.gamma * jnp.squeeze(rows, numbers.offset_dims)
    delta = jnp.tensordot(rows, jnp.squeeze(other, row), (-1, -1))
    delta = jnp.moveaxis(delta, range(indices.ndim - 1, delta.ndim), numbers.offset_dims)
    return [y + delta.astype(y.dtype)]


RULES: dict[compat.Primitive, Rule] = {
    primitives.transpose_p: renaming(lambda view, p: renames.transpose(view, p["permutation"])),
    primitives.reshape_p: renaming(reshape),
    primitives.squeeze_p: renaming(lambda view, p: renames.squeeze(view, p["dimensions"])),
    primitives.broadcast_in_dim_p: renaming(
        lambda view, p: renames.broadcast(view, p["shape"], p["broadcast_dimensions"])
    ),
    primitives.rev_p: renaming(lambda view, p: renames.reverse(view, p["dimensions"])),
    primitives.pad_p: renaming(lambda view, p, value: renames.pad(view, value, p["padding_config"])),
    primitives.slice_p: renaming(
        lambda view, p: renames.slice_axes(view, p["start_indices"], p["limit_indices"], p["strides"])
    ),
    primitives.dynamic_slice_p: renaming(dynamic_slice),
    lax.split_p: split,
    primitives.concatenate_p: concatenate,
    lax.stack_p: stack,
    lax.unstack_p: unstack,
    lax.tile_p: renaming(tile),
    primitives.convert_element_type_p: renaming(cast),
    primitives.copy_p: renaming(lambda view, p: view),
    primitives.neg_p: renaming(lambda view, p: renames.negate(view)),
    primitives.mul_p: multiply,
    primitives.div_p: renaming(divide),
    primitives.add_p: add,
    primitives.add_jaxvals_p: add,
    primitives.sub_p: subtract,
    primitives.stop_gradient_p: each,
    primitives.name_p: each,
    compat.pvary_p: each,
    lax.optimization_barrier_p: optimization_barrier,
    primitives.sharding_constraint_p: constrain_sharding,
    primitives.dot_general_p: dot_general,
    primitives.conv_general_dilated_p: conv_general_dilated,
    compat.ragged_dot_general_p: ragged_dot_general,
    primitives.gather_p: gather,
    **calls.RULES,
}
