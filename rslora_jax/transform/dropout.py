"""Dropout on what adapters see: every site, use, layer and turn of a loop draws a mask of its own.

A view carries the data of a random key along its stack, "mask". Where the program enters a call, a loop or a product
with it, the key takes up the number of that equation, and in a loop that of the turn: what a use draws is told by its
place in the program alone, however often it is traced, and a remat that computes it again draws the same.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from rslora_jax.transform import compat
from rslora_jax.transform.programs import PROGRAMS
from rslora_jax.transform.views import View

_MASK = "mask"
_USES = {primitives.dot_general_p, primitives.conv_general_dilated_p, compat.ragged_dot_general_p}


def with_mask(view: View, key: Array, rate: float, stack_axes: tuple[int, ...]) -> View:
    """Return a view whose adapter is to see data of which a part is zero.

    Args:
      view: the whole weight, with its adapter.
      key: of this weight's adapter alone.
      rate: the part.
      stack_axes: the weight's stacked axes: each element draws for itself.
    """
    sizes = [size if axis in stack_axes else 1 for axis, size in enumerate(view.shape)]
    words = jax.random.key_data(key)
    number = jnp.arange(math.prod(sizes)).astype(words.dtype).reshape(*sizes, 1)
    data = _mixed(jnp.broadcast_to(words, (*sizes, words.shape[-1])), number)
    return dataclasses.replace(view, along={**view.along, _MASK: data}, rate=rate)


def is_masked(value: Any) -> bool:
    """Say whether a value is a view that draws masks."""
    return isinstance(value, View) and any(name.startswith(_MASK) for name in value.along)


def at_place(value: Any, number: Any) -> Any:
    """Return a value as it is at a place of the program, or a turn of a loop, with this number."""
    if not is_masked(value):
        return value
    along = {name: _mixed(part, number) if name.startswith(_MASK) else part for name, part in value.along.items()}
    return dataclasses.replace(value, along=along)


def is_place(primitive: compat.Primitive) -> bool:
    """Say whether an equation is a use, or holds a program in which there may be some."""
    return primitive in PROGRAMS or primitive in _USES


def _mixed(data: Array, number: Any) -> Array:
    """Return the data of other keys: a step of a polynomial hash, modulo 2**32, of the numbers on the way."""
    last = data[..., -1:] * jnp.asarray(2654435761, data.dtype) + (jnp.asarray(number).astype(data.dtype) + 1)
    return jnp.concatenate([data[..., :-1], last], -1)


def dropped(view: View, x: Array) -> Array | None:
    """Return data as a view's adapter sees it: a part of it zero, and the rest as much larger (arXiv 1207.0580).

    None where that is the data itself: without a mask, and for indices, of which a look-up drops none, as in PEFT.
    Within a `shard_map` each device that has data of its own draws for itself.
    """
    if _MASK not in view.along or not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    words = view.along[_MASK]
    data = jnp.sum(words.reshape(-1, words.shape[-1]), 0, dtype=words.dtype)  # of a stack that meets data whole, one
    for axis in sorted(compat.varying(x), key=str):
        data = _mixed(data, lax.axis_index(axis))
    key = jax.random.wrap_key_data(data, impl="threefry2x32" if data.shape[-1] == 2 else "rbg")
    return jnp.where(jax.random.bernoulli(key, 1 - view.rate, x.shape), x / (1 - view.rate), 0).astype(x.dtype)
