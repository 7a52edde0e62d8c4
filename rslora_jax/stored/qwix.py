"""Weights that `qwix` has quantised (https://github.com/google/qwix), taken as they are. The package is not needed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rslora_jax.stored.form import Stored, is_stored
from rslora_jax.stored.nf4 import LEVELS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Qwix(Stored):
    """A weight as a `QArray` holds it: `(codes - zero) * scale`, with a scale for each tile of some axes.

    Attributes:
      codes: of the weight's shape (*stack, *inner): int8, int4, float8 and others, or the place among NF4's levels.
      scale: of the weight's dtype, and of its shape but for the axes that share a scale, whole or in tiles: these have
        as many entries as there are tiles.
      zero: what stands for 0, of the codes' dtype and the scale's shape, or None.
      qtype: what qwix calls the codes, such as "int4" or "nf4".
      depth: how many axes `inner` has.
    """

    codes: Array
    scale: Array
    zero: Array | None
    qtype: str = dataclasses.field(metadata={"static": True})
    depth: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.scale.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        return tuple(self.codes.shape[: self.codes.ndim - self.depth])

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape behind the stack."""
        return tuple(self.codes.shape[self.codes.ndim - self.depth :])

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        tiles = zip(self.inner, self.scale.shape[len(self.stack) :], strict=True)
        ones = (1,) * self.depth
        arrays = {"codes": tuple(1 if n == 1 else size // n for size, n in tiles), "scale": ones}
        return arrays if self.zero is None else {**arrays, "zero": ones}

    @property
    def format(self) -> str:
        return f"qwix {self.qtype}"

    def dense(self) -> Array:
        codes = self.codes
        if self.qtype == "nf4":
            codes = jnp.asarray(LEVELS, jnp.float32).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
        codes = codes.astype(self.dtype)
        if self.zero is not None:
            codes = _by_tile(jnp.subtract, codes, self.zero.astype(self.dtype))
        return _by_tile(jnp.multiply, codes, self.scale)


def _by_tile(act: Callable[[Array, Array], Array], whole: Array, tiles: Array) -> Array:
    """Return the result of an operation on each entry and that of its tile."""
    split = [
        (n, size // n) if n not in (1, size) else (size,) for size, n in zip(whole.shape, tiles.shape, strict=True)
    ]
    spread = [(n, 1) if n not in (1, size) else (n,) for size, n in zip(whole.shape, tiles.shape, strict=True)]
    out = act(whole.reshape([n for part in split for n in part]), tiles.reshape([n for part in spread for n in part]))
    return out.reshape(whole.shape)


def is_weight(node: Any) -> bool:
    """Say whether a node of a pytree is one weight in a form of its own, or in one of qwix's, which `taken` takes."""
    return is_stored(node) or _is_of_qwix(node)


def taken(node: Any) -> Any:
    """Return what a leaf is here: a `QArray` of qwix, alone or in a box with how it was made, is `Qwix`.

    Raises:
      ValueError: its arrays do not fit together.
    """
    if not _is_of_qwix(node):
        return node
    if type(node).__name__ == "WithAux":
        return taken(_unboxed(node.array))
    codes, scale, zero = (_unboxed(getattr(node, name)) for name in ("qvalue", "scale", "zero_point"))
    qtype = node.qtype if isinstance(node.qtype, str) else np.dtype(node.qtype or codes.dtype).name
    parts = [part.shape for part in (scale, zero) if part is not None]
    sizes = [
        len(codes.shape) == len(part) and all(s % max(n, 1) == 0 for s, n in zip(codes.shape, part, strict=True))
        for part in parts
    ]
    if not all(sizes):
        raise ValueError(f"a QArray of shape {codes.shape} has scales or zero points of shape {parts}: tiles are cut")
    # Scans take apart what all arrays have apart.
    apart = [all(part[n] == size for part in parts) for n, size in enumerate(codes.shape[:-2])]
    stack = apart.index(False) if False in apart else len(apart)
    return Qwix(codes, scale, zero, qtype, len(codes.shape) - stack)


def _is_of_qwix(node: Any) -> bool:
    kind = type(node)
    return kind.__name__ in ("QArray", "WithAux") and kind.__module__.partition(".")[0] == "qwix"


def _unboxed(node: Any) -> Any:
    """Return what is in a box of Flax."""
    return node.unbox() if hasattr(node, "unbox") else node
