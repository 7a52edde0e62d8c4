"""Stream tensors from files into arrays where they are to lie, never holding more than some rows on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.model import Progress
from rslora_jax.interop.names import Names, Place, places
from rslora_jax.interop.packing import Packing, fill_packed, num_bytes
from rslora_jax.interop.pieces import CHUNK, Piece, joined, pieces, write
from rslora_jax.interop.safetensors import not_finite
from rslora_jax.interop.tensors import Source, Tensor
from rslora_jax.pytrees import PyTree
from rslora_jax.shown import quoted, shown
from rslora_jax.sites import from_paths, named_leaves


def load_weights(
    tensors: Mapping[str, Tensor],
    shapes: Any,
    shardings: PyTree,
    *,
    names: Names,
    ignored: Callable[[str], bool] = lambda name: False,
    source: str = "the model",
    progress: Progress | None = None,
    packing: Packing | None = None,
) -> Any:
    """Fill a pytree of weights from a file's tensors, by a table of names.

    Each device's part of an array is made on the device, from rows that are read for it; parts that are the same on
    several devices are read once.

    Args:
      tensors: by name, from `shards.open_folder` or `gguf_file.read_gguf`.
      shapes: a pytree of `jax.ShapeDtypeStruct`; numbers are rounded to its dtypes.
      shardings: a pytree like it, of shardings, or of None for the default device.
      names: the table of names, which says too what the file has transposed, such as that of a `Family`.
      ignored: says which tensors may be there without a place.
      source: the model's name, for errors.
      progress: called with the bytes that are done, and all.
      packing: says which weights are held in a form of their own, and makes it; none without.

    Raises:
      ValueError: a tensor is missing, has no place or is of another shape; it is named.

    Warns of tensors that hold infinities or no numbers, of which nothing sound can come.
    """
    leaves, broken = named_leaves(shapes), dict[str, Tensor]()
    sources = _sources(tensors, leaves, names, ignored, source)
    where = dict(zip(leaves, jax.tree.leaves(shardings, is_leaf=lambda leaf: leaf is None), strict=True))
    packed = {path: packing(path, leaf, sources[path]) if packing else None for path, leaf in leaves.items()}
    total = sum(num_bytes(packed[path] or leaf, where[path]) for path, leaf in leaves.items())
    done, found = 0, dict[str, Any]()

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for path, leaf in leaves.items():
        if (own := packed[path]) is not None:
            found[path] = fill_packed(own, where[path], tell)
            continue
        parts = []
        for piece in pieces(leaf.shape, where[path]):
            parts.append((_fill(piece, leaf.dtype, sources[path], broken), piece))
            tell(piece.size * leaf.dtype.itemsize)
        found[path] = joined(leaf.shape, leaf.dtype, where[path], parts)
    warn_not_finite(broken, jax.tree.leaves(shapes)[0].dtype)
    return from_paths(shapes, found)


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors hold the same numbers, reading some rows at a time."""
    if one.shape != other.shape:
        return False
    mine = _chunks(one, range(one.shape[0]))
    return all(np.array_equal(rows, other.rows(row, row + len(rows))) for row, rows in mine)


def check_sizes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], names: Names, source: str
) -> None:
    """Compare some weights with a file's tensors, before a model of their sizes is built.

    Args:
      tensors, names, source: as of `load_weights`.
      shapes: of some weights that tell all sizes, by path.

    Raises:
      ValueError: a tensor is missing or of another shape; it is named.
    """
    for name, place in places(names, shapes).items():
        _check_shape(name, place, shapes[place.path], _found(tensors, name, source))


def _found(tensors: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    raise ValueError(
        f"{source} lacks tensor {shown(name)}: it is not whole, or its weights do not belong to its configuration"
    )


def _check_shape(name: str, place: Place, whole: tuple[int, ...], tensor: Tensor) -> bool:
    """Refuse a tensor of another shape than a weight's; say whether it is transposed."""
    shape = place.one(whole)
    turned = place.is_turned(len(shape))
    if tensor.shape != (wanted := shape[::-1] if turned else shape):
        raise ValueError(
            f"{tensor.path}: tensor {shown(name)} has shape {quoted(tensor.shape)} where its configuration asks for "
            f"{quoted(wanted)}: they do not belong together"
        )
    return turned


def warn_not_finite(broken: Mapping[str, Tensor], dtype: Any) -> None:
    """Warn of tensors, by name, that hold numbers that are not finite, or not in a dtype."""
    if broken:
        name, tensor = next(iter(broken.items()))
        more = f", and {len(broken) - 1} more tensors hold" if len(broken) > 1 else " holds"
        warnings.warn(
            f"{tensor.path}: tensor {shown(name)}{more} numbers that are not finite, or not in {dtype}: nothing "
            "sound can come of them",
            stacklevel=3,
        )


def _sources(
    tensors: Mapping[str, Tensor],
    leaves: Mapping[str, Any],
    names: Names,
    ignored: Callable[[str], bool],
    source: str,
) -> dict[str, Source]:
    """Find every weight's tensors, checked."""
    found = places(names, {path: leaf.shape for path, leaf in leaves.items()})
    for name in found:
        _found(tensors, name, source)
    for name, tensor in tensors.items():
        if name not in found and not ignored(name):
            raise ValueError(
                f"{tensor.path} holds tensor {shown(name)}, for which this model has no place: load another model"
            )
    parts: dict[str, list[Tensor]] = {path: [] for path in leaves}
    turned = dict[str, bool]()
    for name, place in found.items():
        turned[place.path] = _check_shape(name, place, leaves[place.path].shape, tensors[name])
        parts[place.path].append(tensors[name])  # `places` gives layers in their order
    stacks = {place.path for place in found.values() if place.layer is not None}
    return {path: Source(tuple(of), path in stacks, turned[path]) for path, of in parts.items()}


def _fill(piece: Piece, dtype: Any, source: Source, broken: dict[str, Tensor]) -> jax.Array:
    """Read a piece onto its first device; tensors with numbers that are not finite go into `broken`."""
    shape, turn = piece.shape, source.is_turned
    if piece.size * np.dtype(dtype).itemsize <= CHUNK:  # no program to compile, and little to hold twice
        whole = np.empty(shape, dtype)
        for start, rows in _rows(piece, source, dtype, broken):
            rows = rows.swapaxes(-1, -2) if turn else rows
            whole[tuple(slice(first, first + size) for first, size in zip(start, rows.shape, strict=True))] = rows
        return jax.block_until_ready(jax.device_put(whole, piece.devices[0]))
    target = jnp.zeros(shape, dtype, device=piece.devices[0])
    for start, rows in _rows(piece, source, dtype, broken):
        # Some rows are read while others are written, and no more wait.
        target.block_until_ready()
        # JAX would cut float64 to float32 with a warning.
        target = write(target, rows.astype(np.float32) if rows.dtype == np.float64 else rows, start, turn)
    return target.block_until_ready()


def _rows(
    piece: Piece, source: Source, dtype: Any, broken: dict[str, Tensor]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Read a piece some rows at a time: where in the piece they begin, and they as the file has them."""
    layers, *along = piece.part if source.is_stack else (range(1), *piece.part)
    rows, *columns = reversed(along) if source.is_turned else along
    for place, layer in enumerate(layers):
        tensor = source.tensors[layer]
        for row, chunk in _chunks(tensor, rows):
            if _not_finite_in(dtype, chunk):
                broken[tensor.name] = tensor
            start = [row - rows.start, *(0 for _ in columns)]
            chunk = chunk[(slice(None), *(slice(one.start, one.stop) for one in columns))]
            where = start[::-1] if source.is_turned else start
            yield (place, *where) if source.is_stack else tuple(where), chunk[None] if source.is_stack else chunk


def _not_finite_in(dtype: Any, chunk: np.ndarray) -> bool:
    """Say whether a number is none or infinite, or will be when it is rounded."""
    largest = float(jnp.finfo(dtype).max)
    if not_finite(chunk):
        return True
    return float(jnp.finfo(chunk.dtype).max) > largest and bool(max(chunk.max(), -chunk.min()) > largest)


def _chunks(tensor: Tensor, rows: range) -> Iterator[tuple[int, np.ndarray]]:
    """Read rows in pieces of about `CHUNK` bytes, each with the number of its first row."""
    step = max(1, CHUNK // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for row in range(rows.start, rows.stop, step):
        yield row, tensor.rows(row, min(row + step, rows.stop))
