"""Weights of GGUF files kept in the blocks that the file has them in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.gguf_file import GgufTensor
from rslora_jax.interop.packing import Packed, Packing, stacked_shapes
from rslora_jax.interop.tensors import Source
from rslora_jax.stored import Gguf
from rslora_jax.stored.gguf import KINDS

_PLAIN = ("F32", "F16", "BF16", "F64")
# Where the float16s are in a block of each kind, by which all its numbers are multiplied, or which are added.
_HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def packing_of_gguf(unpacked: list[str], broken: dict[str, GgufTensor]) -> Packing:
    """Give the packing that keeps blocks as they are.

    Args:
      unpacked: gets the names of tensors in blocks that are made dense: of a kind that is not known, or of a stack in
        which other layers are no blocks.
      broken: gets the tensors that hold numbers that are not finite.
    """

    def packing(path: str, leaf: jax.ShapeDtypeStruct, source: Source) -> Packed | None:
        tensors = [tensor for tensor in source.tensors if isinstance(tensor, GgufTensor)]
        kinds = [tensor.kind.name for tensor in tensors]
        if len(tensors) < len(source.tensors) or any(len(tensor.shape) != 2 for tensor in tensors):
            return None
        if not all(kind in KINDS for kind in kinds):
            unpacked.extend(t.name for t, kind in zip(tensors, kinds, strict=True) if kind not in _PLAIN)
            return None
        several = tuple(sorted(set(kinds)))
        length = max(tensor.row_bytes for tensor in tensors)

        def element(n: int) -> Gguf:
            if not _is_finite(tensors[n], rows := tensors[n].packed(), leaf.dtype):
                broken[tensors[n].name] = tensors[n]
            rows = np.pad(rows, [(0, 0), (0, length - rows.shape[1])])
            return _gguf(rows, source.is_turned, tensors[n].shape, several, kinds[n], leaf.dtype)

        rows = np.broadcast_to(np.uint8(0), (tensors[0].shape[0], length))
        one = _gguf(rows, source.is_turned, tensors[0].shape, several, kinds[0], leaf.dtype)
        return Packed(stacked_shapes(one, len(tensors) if source.is_stack else None), element, source.is_stack)

    return packing


def _gguf(rows: np.ndarray, is_turned: bool, shape: Any, several: tuple[str, ...], kind: str, dtype: Any) -> Gguf:
    """Give one matrix, (out, in) in the file, as it is or as a kernel (in, out)."""
    which = np.int32(several.index(kind)) if len(several) > 1 else None
    inner = shape[::-1] if is_turned else shape
    data = np.ascontiguousarray(rows.T) if is_turned else rows
    return Gguf(data, which, tuple(inner), jnp.dtype(dtype), 0 if is_turned else 1, several)  # type: ignore[arg-type]


def _is_finite(tensor: GgufTensor, rows: np.ndarray, dtype: Any) -> bool:
    """Say whether all numbers of a matrix in blocks are finite in a dtype."""
    kind, size = tensor.kind.name, KINDS[tensor.kind.name].bytes
    blocks = rows.reshape(-1, size)
    halves = [blocks[:, at : at + 2].copy().view(np.float16) for at in _HALVES[kind]]
    if not all(np.isfinite(half).all() for half in halves):
        return False
    # In a block a float16 is multiplied by less than 4,096.
    return float(jnp.finfo(dtype).max) > 65504 * 4096 or bool(np.abs(tensor.rows(0, tensor.shape[0])).max() <= 65504)
