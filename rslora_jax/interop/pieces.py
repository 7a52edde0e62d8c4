"""The parts of an array that lie on this process's devices, and how rows are written into them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

CHUNK = 1 << 23  # bytes that are on the way at a time


class Piece(NamedTuple):
    """A part of an array, and the devices of this process that hold it; None is the default one."""

    part: tuple[range, ...]
    devices: list[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own shape."""
        return tuple(map(len, self.part))

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def pieces(shape: tuple[int, ...], sharding: Any) -> Iterable[Piece]:
    """Give the parts of an array; those that are the same on several devices are one."""
    if sharding is None:
        return [Piece(tuple(map(range, shape)), [None])]
    found: dict[tuple[range, ...], Piece] = {}
    for device, slices in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(range(*along.indices(size)) for along, size in zip(slices, shape, strict=True))
        found.setdefault(part, Piece(part, [])).devices.append(device)
    return found.values()


def joined(shape: tuple[int, ...], dtype: Any, sharding: Any, parts: Iterable[tuple[jax.Array, Piece]]) -> jax.Array:
    """Give the array of which these are the parts, each on the first of its devices."""
    single = [
        jax.block_until_ready(array if n == 0 else jax.device_put(array, device))
        for array, piece in parts
        for n, device in enumerate(piece.devices)
    ]
    if sharding is None:
        return single[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, single, dtype=dtype)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def write(target: jax.Array, rows: jax.Array, start: tuple[Any, ...], turn: bool) -> jax.Array:
    """Write rows of a tensor into its array, in place."""
    rows = rows.swapaxes(-1, -2) if turn else rows
    return lax.dynamic_update_slice(target, rows.astype(target.dtype), start)
