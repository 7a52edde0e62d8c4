"""Collectives inside a `shard_map`, as a program that gathers or passes on its weights by hand has them."""

from typing import Any

import jax
from jax import Array

from rslora_jax.stored.form import is_stored
from rslora_jax.transform import compat
from rslora_jax.transform.interpreter import Walk
from rslora_jax.transform.renames import rename, untouched
from rslora_jax.transform.views import View, spans


def all_gather(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any] | None:
    """Gather a weight by gathering its factors.

    On a new axis, every device's weight comes with its own factors: it is a stack. Joined along an axis that it has,
    the factor that lacks that axis stays, and has to be the same on all devices.
    """
    (view,), p = values, eqn.params
    dim, tiled = p["all_gather_dimension"], p["tiled"]
    if is_stored(view.w):
        return None
    names = _names_of(p["axis_name"])
    if tiled and not all(
        spans(view, part)[dim] or names <= same or view.shape[dim] == 1
        for part, same in zip(view.parts, view.shared, strict=True)
    ):
        return None

    def act(array: Array, spanned: tuple[bool, ...]) -> Array:
        if tiled and not spanned[dim]:
            return array
        return compat.bind(eqn, _varied(array, view))[0]

    axes = view.axes if tiled else (*view.axes[:dim], frozenset(), *view.axes[dim:])
    return [rename(view, act, axes, ())]


def ppermute(walk: Walk, eqn: compat.Eqn, values: list[Any]) -> list[Any]:
    """Pass a weight on with its parts; a device that is sent nothing has zeros, and no update."""
    (view,) = values
    return [untouched(view, lambda array: compat.bind(eqn, _varied(array, view))[0])]


def _varied(array: Array, view: View) -> Array:
    """Let a factor vary over devices as its weight does: JAX takes none into a collective that is the same on all."""
    return compat.vary_together(array, *jax.tree.leaves(view.w))[0]


def _names_of(axis_name: Any) -> frozenset[Any]:
    return frozenset(axis_name if isinstance(axis_name, tuple | list) else (axis_name,))
