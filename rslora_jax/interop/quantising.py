"""Weights that are rounded to a format as they are read from their files, one tensor after the other."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.packing import Packed, Packing, stacked_shapes
from rslora_jax.interop.tensors import Source, Tensor
from rslora_jax.shown import shown
from rslora_jax.stored import Stored
from rslora_jax.stored.kept import kept_dense
from rslora_jax.stored.rounding import rounding


def quantising(name: str) -> Packing:
    """Give the packing that rounds weights to a format: those, and to what, that `rslora_jax.quantize` does.

    A matrix that is not finite is a ValueError when it is read.
    """
    make = functools.partial(rounding(name), axes=(0,))

    def packing(path: str, leaf: jax.ShapeDtypeStruct, source: Source) -> Packed | None:
        shape = tuple(leaf.shape[1:] if source.is_stack else leaf.shape)
        if kept_dense(path, leaf.shape) or len(shape) != 2:
            return None
        one = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, leaf.dtype))
        count = len(source.tensors) if source.is_stack else None

        def element(n: int) -> Stored:
            return make(_whole(source.tensors[n], source.is_turned, leaf.dtype))

        return Packed(stacked_shapes(one, count), element, source.is_stack)

    return packing


def _whole(tensor: Tensor, is_turned: bool, dtype: Any) -> jax.Array:
    """Read a matrix whole, rounded to a dtype; (in, out) where the file has it (out, in)."""
    with np.errstate(over="ignore"):
        rows = tensor.rows(0, tensor.shape[0]).astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(rows).all():
        raise ValueError(
            f"{tensor.path}: tensor {shown(tensor.name)} holds numbers that are not finite, or not in {dtype}, and "
            "is to be quantised: take a model that is whole"
        )
    return jnp.asarray(rows.T if is_turned else rows)
