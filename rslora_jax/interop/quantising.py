"""Weights that are rounded to a format as they are read from their files, one tensor after the other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.packing import Packed, Packing, stacked_shapes
from rslora_jax.interop.tensors import Source, Tensor
from rslora_jax.shown import shown
from rslora_jax.stored import Stored
from rslora_jax.stored.kept import kept_dense
from rslora_jax.stored.nf4 import doubled
from rslora_jax.stored.rounding import Rounding, rounding

PART = 1 << 21  # bytes of float32 that are rounded at a time


def quantising(name: str) -> Packing:
    """Give the packing that rounds weights to a format: those, and to what, that `rslora_jax.quantize` does.

    A matrix that is not finite is a ValueError when it is read.
    """
    make = rounding(name)

    def packing(path: str, leaf: jax.ShapeDtypeStruct, source: Source) -> Packed | None:
        shape = tuple(leaf.shape[1:] if source.is_stack else leaf.shape)
        if kept_dense(path, leaf.shape) or len(shape) != 2:
            return None
        one = jax.eval_shape(functools.partial(make, axes=(0,)), jax.ShapeDtypeStruct(shape, leaf.dtype))
        count = len(source.tensors) if source.is_stack else None

        def element(n: int) -> Stored:
            return _rounded(make, source.tensors[n], source.is_turned, leaf.dtype)

        return Packed(stacked_shapes(one, count), element, source.is_stack)

    return packing


def _rounded(make: Rounding, tensor: Tensor, is_turned: bool, dtype: Any) -> Stored:
    """Round a matrix (in, out): of one that the file has as (out, in) some out channels after others.

    No channel needs another, but where blocks go through all of a matrix, and for the scales of scales.
    """
    if not is_turned or (make.format == "nf4" and tensor.shape[1] % make.block):
        rows = _rows(tensor, 0, tensor.shape[0], dtype)
        return make(rows.T if is_turned else rows, axes=(0,))
    single = dataclasses.replace(make, double=False)
    num_rows, row_bytes = tensor.shape[0], 4 * tensor.shape[1]
    count = max(1, min(num_rows, -(-num_rows * row_bytes // PART)))
    bounds = [n * num_rows // count for n in range(count + 1)]
    parts = [
        jax.block_until_ready(single(_rows(tensor, first, stop, dtype).T, axes=(0,)))
        for first, stop in itertools.pairwise(bounds)
    ]
    shape = jax.ShapeDtypeStruct(tensor.shape[::-1], dtype)
    structure = jax.tree.structure(jax.eval_shape(functools.partial(single, axes=(0,)), shape))
    joined = [jnp.concatenate(arrays, axis=1) for arrays in zip(*map(jax.tree.leaves, parts), strict=True)]
    whole = jax.tree.unflatten(structure, joined)
    return doubled(whole) if make.format == "nf4" and make.double else whole


def _rows(tensor: Tensor, first: int, stop: int, dtype: Any) -> np.ndarray:
    """Read some rows of a matrix, rounded to a dtype."""
    with np.errstate(over="ignore"):
        rows = tensor.rows(first, stop).astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(rows).all():
        raise ValueError(
            f"{tensor.path}: tensor {shown(tensor.name)} holds numbers that are not finite, or not in {dtype}, and "
            "is to be quantised: take a model that is whole"
        )
    return rows
