"""A checksum of arrays that is the same wherever they lie: on one device, on a mesh, or in the host's memory."""

import dataclasses
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rslora_jax.pytrees import PyTree
from rslora_jax.sites import named_leaves
from rslora_jax.store.keys import is_key
from rslora_jax.stored.form import is_stored


def checksums(tree: PyTree) -> dict[str, str]:
    """Describe every array of a tree by path: its dtype, its shape and a checksum of its bits.

    Each array is summed where it lies and only the sums travel, so that a mesh, another number of devices or of
    processes gives the same. It finds damage and mix-ups; it is no defence against somebody who wants to deceive.

    >>> checksums({"w": np.ones((4, 4), np.float32)}) == checksums({"w": jnp.ones((4, 4))})
    True
    >>> checksums({"w": np.float32([1, 2])})
    {'w': 'float32[2] 839a35c3'}
    """
    leaves = named_leaves(tree)
    # One after the other: sums over processes that overlap can each wait for the other.
    return {path: f"{form_of(leaf)} {int(_word(leaf)):08x}" for path, leaf in leaves.items()}


def form_of(leaf: Any) -> str:
    """Write an array's dtype and shape, and the form in which it is stored if it is none.

    >>> from rslora_jax.stored import int8
    >>> form_of(np.ones((2, 3))), form_of(int8(jnp.ones((2, 3))))
    ('float64[2,3]', 'Int8 of float32[2,3]')
    """
    kind = f"{leaf.format} of {leaf.dtype}" if is_stored(leaf) else leaf.dtype
    return f"{kind}[{','.join(map(str, leaf.shape))}]"


class Form(NamedTuple):
    """What `checksums` tells of an array beside its bits.

    Attributes:
      format: the name of the form in which it is stored; None of an array.
      dtype: its dtype's name.
      shape: its shape.
    """

    format: str | None
    dtype: str
    shape: tuple[int, ...]


def read_form(text: str) -> Form | None:
    """Read what `form_of` writes, with a checksum behind it or not; None where it is something else.

    >>> read_form("Q4_1 of float32[30,576] 5d0c"), read_form("missing")
    (Form(format='Q4_1', dtype='float32', shape=(30, 576)), None)
    """
    found = re.match(r"(?:(.+) of )?(\w+)\[([\d,]*)\]", text)
    return Form(found[1], found[2], tuple(int(n) for n in found[3].split(",") if n)) if found else None


def same_form(one: str, other: str) -> bool:
    """Say whether two entries of `checksums` are of one form, and differ in their numbers alone if at all."""
    return one.rpartition(" ")[0] == other.rpartition(" ")[0]


def _word(leaf: Any) -> Array:
    """Return the checksum of an array, or of all arrays of a stored weight, each mixed with its place among them.

    What a stored weight has beside its arrays, such as the name of its code, counts as it is printed.
    """
    if not is_stored(leaf):
        return _word_of_array(leaf)
    words = [_mix(_word_of_array(part) + np.uint32(n)) for n, part in enumerate(jax.tree.leaves(leaf))]
    words.append(jnp.uint32(zlib.crc32(_beside_arrays(leaf).encode())))
    return jnp.sum(jnp.stack(words), dtype=jnp.uint32)


def _beside_arrays(leaf: Any) -> str:
    """Write what a stored weight has beside its arrays and its dtype."""
    fields = [f.name for f in dataclasses.fields(leaf) if f.metadata.get("static") and f.name != "dtype"]
    return repr({name: getattr(leaf, name) for name in fields})


def _word_of_array(x: Any) -> Array:
    """Sum an array's bits, each element mixed with its place, modulo 2^32.

    XLA on CPUs makes 4 bytes of every element before it sums them: of a stack of matrices, one after the other, unless
    a mesh has taken the stack apart.
    """
    apart = isinstance(x, Array) and x.ndim > 0 and x.sharding.shard_shape(x.shape)[0] != x.shape[0]
    if is_key(x) or x.ndim < 3 or apart:
        return _sum(x, np.uint32(0))
    on_host = isinstance(x, np.ndarray)
    words = [_sum(x[n], np.uint32(n)) if on_host else _sum_of_slice(x, np.uint32(n)) for n in range(len(x))]
    return jnp.sum(jnp.stack(words), dtype=jnp.uint32) if words else jnp.uint32(0)


@jax.jit
def _sum_of_slice(x: Array, number: Any) -> Array:
    return _sum(lax.dynamic_index_in_dim(x, number, keepdims=False), number)


@jax.jit
def _sum(x: Array, number: Any) -> Array:
    """Sum the bits of an array, which has this number in a stack."""
    bits = _bits_of(jax.random.key_data(x) if is_key(x) else x)
    places = _places(bits.shape) + number * np.uint32(bits.size % 2**32)
    return jnp.sum(_mix(bits + places * np.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _bits_of(x: Array) -> Array:
    """Return an array's bits as uint32; elements of 64 bits become two."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype.name.startswith("float4"):
        x = lax.bitcast_convert_type(x, "uint4")
    if x.dtype == bool or x.dtype.name in ("int2", "int4", "uint2", "uint4"):
        return x.astype(jnp.uint32)
    width = min(8 * x.dtype.itemsize, 32)
    return lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> Array:
    """Number the elements of an array in its own order, modulo 2^32."""
    number, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        number += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return number


def _mix(x: Array) -> Array:
    """Spread every bit over all 32, reversibly: xor-shifts and odd multiplications, as in hash functions."""
    for shift, odd in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(odd)
    return x ^ (x >> 16)
