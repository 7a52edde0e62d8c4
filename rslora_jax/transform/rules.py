"""What each primitive does to a view: rename it, or use it where it meets data."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from rslora_jax.transform import calls, compat, views
from rslora_jax.transform.dot import dot
from rslora_jax.transform.interpreter import Rule, Use, Walk
from rslora_jax.transform.product import adapted_product
from rslora_jax.transform.views import View


def transpose(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    return [views.transpose(values[0], eqn.params["permutation"])]


def reshape(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    view = views.reshape(values[0], eqn.params["new_sizes"]) if len(values) == 1 else None
    return None if view is None else [view]


def squeeze(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    return [views.squeeze(values[0], eqn.params["dimensions"])]


def slice_(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    p = eqn.params
    return [views.slice_axes(values[0], p["start_indices"], p["limit_indices"], p["strides"])]


def dynamic_slice(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    view, *starts = values
    if not isinstance(view, View) or len(starts) != len(view.shape):
        return None
    return [views.dynamic_slice(view, starts, eqn.params["slice_sizes"])]


def convert_element_type(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    (view,) = values
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    # Only the first cast waits: a second one must see the base as the first has rounded it.
    w = view.w if view.dtype == view.w.dtype else view.base
    return [View(w, view.a, view.b, view.axes, jnp.dtype(dtype), view.site)]


def same(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    return [values[0]]


def optimization_barrier(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    # A barrier orders computed values; a weight is an input and needs none.
    fenced = iter(compat.bind(eqn, *(v for v in values if not isinstance(v, View))))
    return [v if isinstance(v, View) else next(fenced) for v in values]


def constrain_sharding(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    # The constraint is on an array of the weight's shape; the factors are left to the compiler.
    (view,) = values
    (w,) = compat.bind(eqn, view.w)
    return [View(w, view.a, view.b, view.axes, view.dtype, view.site)]


def dot_general(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view in a product, whichever side it stands on and whichever axes are contracted."""
    lhs, rhs = values
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    for view, contracted, batch in ((lhs, lhs_contracted, lhs_batch), (rhs, rhs_contracted, rhs_batch)):
        if isinstance(view, View):
            label = lambda axes, view=view: frozenset().union(*(view.axes[n] for n in axes))
            rest = [n for n in range(len(view.shape)) if n not in (*contracted, *batch)]
            walk.on_use(Use(view.site, "product", label(contracted), label(batch), label(rest), eqn))
    if isinstance(lhs, View) and isinstance(rhs, View):
        lhs = walk.array(lhs, "dot_general of two weights")
    view_left = isinstance(lhs, View)
    view = lhs if view_left else rhs
    if view.a is None:
        return compat.bind(eqn, *((view.base, rhs) if view_left else (lhs, view.base)))

    x = rhs if view_left else lhs
    how = dot(view, x, view_left, eqn.params)
    return None if how is None else [adapted_product(how[0], x, view.w, *how[1:])]


def gather(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Use a view as a table of rows: look the rows up in A, and multiply those few by B."""
    view, indices = values
    if not isinstance(view, View):
        return None
    numbers = eqn.params["dimension_numbers"]
    whole = tuple(eqn.params["slice_sizes"])
    looked_up = [n for n, (size, full) in enumerate(zip(whole, view.shape, strict=True)) if size != full]
    looked_up = looked_up or list(numbers.collapsed_slice_dims)
    if (
        len(looked_up) != 1
        or tuple(numbers.start_index_map) != tuple(looked_up)
        or tuple(numbers.collapsed_slice_dims) != tuple(looked_up)
        or numbers.operand_batching_dims
        or (eqn.params["fill_value"] not in (None, 0) and eqn.params["fill_value"] == eqn.params["fill_value"])
    ):
        return None
    (row,) = looked_up
    label = lambda axes: frozenset().union(*(view.axes[n] for n in axes))
    rest = [n for n in range(len(view.shape)) if n != row]
    walk.on_use(Use(view.site, "lookup", label([row]), frozenset(), label(rest), eqn))
    if view.a is None:
        return compat.bind(eqn, view.base, indices)
    spanned_a, spanned_b = views.spans(view, view.a), views.spans(view, view.b)
    if not spanned_a[row] or spanned_b[row] or any(spanned_a[n] for n in rest):
        return None
    (y,) = compat.bind(eqn, view.base, indices)
    rows: Array = lax.gather(
        jnp.squeeze(view.a, rest),
        indices,
        lax.GatherDimensionNumbers((indices.ndim - 1,), (0,), (0,)),
        (1, view.a.shape[-1]),
        indices_are_sorted=eqn.params["indices_are_sorted"],
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
        fill_value=eqn.params["fill_value"],
    )
    delta = jnp.tensordot(rows, jnp.squeeze(view.b, row), (-1, -1))
    delta = jnp.moveaxis(delta, range(indices.ndim - 1, delta.ndim), numbers.offset_dims)
    return [y + delta.astype(y.dtype)]


RULES: dict[str, Rule] = {
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "convert_element_type": convert_element_type,
    "copy": same,
    "copy_p": same,
    "optimization_barrier": optimization_barrier,
    "sharding_constraint": constrain_sharding,
    "dot_general": dot_general,
    "gather": gather,
    **calls.RULES,
}
