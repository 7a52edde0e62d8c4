"""Weights that are held in a form of their own, made from a file's tensors one by one: none is dense on the way."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.pieces import CHUNK, Piece, joined, pieces, write
from rslora_jax.interop.tensors import Source
from rslora_jax.shown import shown
from rslora_jax.stored import Stored
from rslora_jax.stored.laid import stored_shardings


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight in a form of its own, before it is made.

    Attributes:
      shapes: the whole weight, of `jax.ShapeDtypeStruct`s.
      element: gives what one tensor becomes, by its number: of a stack one element, which has no stack.
      is_stack: whether the weight is a stack of several.
    """

    shapes: Stored
    element: Callable[[int], Stored]
    is_stack: bool


# Says of a weight, by its path, its shape and dtype, and the tensors that it is made of, in what form it is held; None
# for an array.
Packing = Callable[[str, jax.ShapeDtypeStruct, Source], Packed | None]


def stacked_shapes(one: Stored, count: int | None) -> Stored:
    """Give the shapes of a stack of so many elements, from those of one; None for one alone."""
    front = () if count is None else (count,)
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct((*front, *array.shape), array.dtype), one)


def num_bytes(leaf: Any, sharding: Any) -> int:
    """Give the bytes of a weight's parts that are made for this process; of arrays and of what is packed."""
    shapes = leaf.shapes if isinstance(leaf, Packed) else leaf
    return sum(
        piece.size * array.dtype.itemsize
        for array, at in _with_shardings(shapes, sharding)
        for piece in pieces(array.shape, at)
    )


def fill_packed(packed: Packed, sharding: Any, tell: Callable[[int], Any]) -> Any:
    """Make a weight where it is to lie, from one tensor after the other.

    Args:
      packed: what it is.
      sharding: where the weight lies, as if it were an array; None for the default device.
      tell: told the bytes of each part that is done.
    """
    arrays = _with_shardings(packed.shapes, sharding)
    plans = [list(pieces(array.shape, at)) for array, at in arrays]
    targets = [[_empty(piece, array.dtype) for piece in plan] for (array, _), plan in zip(arrays, plans, strict=True)]
    here = {n for plan in plans for piece in plan for n in piece.part[0]} if packed.is_stack else {0}
    for n in sorted(here):
        for k, array in enumerate(jax.tree.leaves(packed.element(n))):
            for m, piece in enumerate(plans[k]):
                if packed.is_stack and n not in piece.part[0]:
                    continue
                own = piece.part[1:] if packed.is_stack else piece.part
                block = array[tuple(slice(along.start, along.stop) for along in own)]
                at = (n - piece.part[0].start,) if packed.is_stack else ()
                targets[k][m] = _put(targets[k][m], block, at, piece)
                tell(block.size * block.dtype.itemsize)
    made = [
        joined(
            array.shape, array.dtype, at, [(jax.device_put(t, p.devices[0]), p) for t, p in zip(of, plan, strict=True)]
        )
        for (array, at), of, plan in zip(arrays, targets, plans, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(packed.shapes), made)


def warn_of_unpacked(path: Any, unpacked: Collection[str]) -> None:
    """Say which tensors in fewer bits a model holds as arrays."""
    if not unpacked:
        return
    first, *rest = unpacked
    more = f" and {len(rest)} more tensors" if rest else ""
    warnings.warn(
        f"{path}: tensor {shown(first)}{more} {'are' if rest else 'is'} held as arrays, which takes more memory: their "
        "kind is not kept packed here, or not all layers have one kind",
        stacklevel=3,
    )


def _with_shardings(leaf: Any, sharding: Any) -> list[tuple[Any, Any]]:
    """Give the arrays of a weight, each with where it lies."""
    arrays = jax.tree.leaves(leaf)
    if sharding is None:
        return [(array, None) for array in arrays]
    return list(zip(arrays, jax.tree.leaves(stored_shardings(leaf, sharding)), strict=True))


def _empty(piece: Piece, dtype: Any) -> Any:
    """Give what a piece is written into: where that is little, in the host's memory, as no program is then compiled."""
    if piece.size * np.dtype(dtype).itemsize <= CHUNK:
        return np.empty(piece.shape, dtype)
    return jnp.zeros(piece.shape, dtype, device=piece.devices[0])


def _put(target: Any, block: Any, at: tuple[int, ...], piece: Piece) -> Any:
    """Write what one tensor became into its place."""
    if not at:
        return block
    if isinstance(target, np.ndarray):
        target[at] = block
        return target
    target.block_until_ready()  # so that no more blocks wait than one
    start = (*at, *(0 for _ in block.shape))
    return write(target, jax.device_put(block[None], piece.devices[0]), start, False)
