"""Stream tensors from files into arrays where they are to lie, never holding more than some rows on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rslora_jax.interop.model import Progress
from rslora_jax.interop.names import Names, places
from rslora_jax.interop.tensors import Tensor
from rslora_jax.sites import named_leaves

_CHUNK = 1 << 23  # bytes that are on the way at a time


def load_weights(
    tensors: Mapping[str, Tensor],
    shapes: Any,
    shardings: Any,
    *,
    names: Names,
    ignored: Callable[[str], bool] = lambda name: False,
    source: str = "the model",
    progress: Progress | None = None,
) -> Any:
    """Fill a pytree of weights from a Hugging Face model's tensors, by a table of names.

    Kernels, which are (out, in) there, become (in, out). Each device's part of an array is made on the device, from
    rows that are read for it; parts that are the same on several devices are read once.

    Args:
      tensors: by name, from `open_folder`.
      shapes: a pytree of `jax.ShapeDtypeStruct`; numbers are rounded to its dtypes.
      shardings: a pytree like it, of shardings, or of None for the default device.
      names: the table of names, such as `names.LLAMA`.
      ignored: says which tensors may be there without a place.
      source: the model's name, for errors.
      progress: called with the bytes that are done, and all.

    Raises:
      ValueError: a tensor is missing, has no place or is of another shape; it is named.
    """
    leaves = named_leaves(shapes)
    found = places(names, {path: leaf.shape for path, leaf in leaves.items()})
    for name in found:
        if name not in tensors:
            raise ValueError(
                f"{source} lacks tensor {name}: its files are not whole or do not belong to its config.json"
            )
    for name, tensor in tensors.items():
        if name not in found and not ignored(name):
            raise ValueError(
                f"{tensor.path} holds tensor {name}, for which this model has no place: load another model"
            )
    parts: dict[str, list[Tensor]] = {path: [] for path in leaves}
    for name, place in found.items():
        leaf, tensor = leaves[place.path], tensors[name]
        shape = leaf.shape if place.layer is None else leaf.shape[1:]
        shape = shape[::-1] if _is_kernel(place.path) else shape
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.path}: tensor {name} has shape {tensor.shape} where config.json asks for {tuple(shape)}: "
                "the files do not belong together"
            )
        parts[place.path].append(tensor)  # `places` gives layers in their order
    where = dict(zip(leaves, jax.tree.leaves(shardings, is_leaf=lambda leaf: leaf is None), strict=True))
    plans = {path: list(_pieces(leaf.shape, where[path])) for path, leaf in leaves.items()}
    total = sum(piece.size * leaves[path].dtype.itemsize for path, plan in plans.items() for piece in plan)
    done = 0
    arrays = []
    for path, leaf in leaves.items():
        single = []
        for piece in plans[path]:
            first = _fill(piece, leaf.dtype, parts[path], path)
            # Asked for one by one, so that what is not yet there does not pile up.
            single += [first, *(jax.block_until_ready(jax.device_put(first, device)) for device in piece.devices[1:])]
            done += piece.size * leaf.dtype.itemsize
            if progress:
                progress(done, total)
        sharding = where[path]
        whole = partial(jax.make_array_from_single_device_arrays, leaf.shape, sharding)
        arrays.append(single[0] if sharding is None else whole(single, dtype=leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


class _Piece(NamedTuple):
    """A part of an array, and the devices of this process that hold it; None is the default one."""

    part: tuple[range, ...]
    devices: list[Any]

    @property
    def size(self) -> int:
        return math.prod(map(len, self.part))


def _pieces(shape: tuple[int, ...], sharding: Any) -> Iterable[_Piece]:
    if sharding is None:
        return [_Piece(tuple(map(range, shape)), [None])]
    pieces: dict[tuple[range, ...], _Piece] = {}
    for device, slices in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(range(*along.indices(size)) for along, size in zip(slices, shape, strict=True))
        pieces.setdefault(part, _Piece(part, [])).devices.append(device)
    return pieces.values()


def _is_kernel(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _fill(piece: _Piece, dtype: Any, parts: list[Tensor], path: str) -> jax.Array:
    shape, is_kernel = [len(along) for along in piece.part], _is_kernel(path)
    if piece.size * np.dtype(dtype).itemsize <= _CHUNK:  # no program to compile, and little to hold twice
        whole = np.empty(shape, dtype)
        for start, rows in _rows(piece, parts, is_kernel):
            rows = rows.swapaxes(-1, -2) if is_kernel else rows
            whole[tuple(slice(first, first + size) for first, size in zip(start, rows.shape, strict=True))] = rows
        return jax.block_until_ready(jax.device_put(whole, piece.devices[0]))
    target = jnp.zeros(shape, dtype, device=piece.devices[0])
    for start, rows in _rows(piece, parts, is_kernel):
        # Some rows are read while others are written, and no more wait.
        target.block_until_ready()
        # JAX would cut float64 to float32 with a warning.
        target = _write(target, rows.astype(np.float32) if rows.dtype == np.float64 else rows, start, is_kernel)
    return target.block_until_ready()


def _rows(piece: _Piece, parts: list[Tensor], is_kernel: bool) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Read a piece some rows at a time: where in the piece they begin, and they as the file has them."""
    is_stack = len(piece.part) > len(parts[0].shape)
    layers, *along = piece.part if is_stack else (range(1), *piece.part)
    rows, *columns = reversed(along) if is_kernel else along
    for place, layer in enumerate(layers):
        for row, chunk in parts[layer].chunks(rows.start, rows.stop, _CHUNK):
            start = [row - rows.start, *(0 for _ in columns)]
            if columns:
                chunk = chunk[:, columns[0].start : columns[0].stop]
            where = start[::-1] if is_kernel else start
            yield (place, *where) if is_stack else tuple(where), chunk[None] if is_stack else chunk


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(target: jax.Array, rows: jax.Array, start: tuple[Any, ...], is_kernel: bool) -> jax.Array:
    """Write rows of a tensor into its array, in place."""
    rows = rows.swapaxes(-1, -2) if is_kernel else rows
    return lax.dynamic_update_slice(target, rows.astype(target.dtype), start)
