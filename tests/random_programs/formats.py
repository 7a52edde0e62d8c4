"""The package's own formats, for weights of any small shape: of an array what it is stored as, or the array."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rslora_jax.stored import float8, int8, nf4
from rslora_jax.stored.qwix import Qwix
from tests.stored.packed import random_blocks

BLOCK = 32  # the axis that blocks of GGUF need


def gguf(kind: str) -> Callable[[Any], Any]:
    """Blocks of GGUF along the last of its two inner axes that is a whole number of them, of numbers of their own."""

    def of(w: Any) -> Any:
        fitting = [n for n in (1, 0) if w.shape[w.ndim - 2 + n] % BLOCK == 0]
        return random_blocks(kind, w.shape, fitting[0], w.dtype, seed=w.size) if fitting else w

    return of


def qwix(qtype: str, has_zero: bool) -> Callable[[Any], Any]:
    """What a `QArray` of qwix holds: tiles of two along the last axis but one, where its size is even."""

    def of(w: Any) -> Qwix:
        tile = 2 - w.shape[-2] % 2
        split = w.reshape(*w.shape[:-2], w.shape[-2] // tile, tile, w.shape[-1])
        most = jnp.maximum(jnp.abs(split).max(-2, keepdims=True), 0.1).astype(w.dtype)
        step = most if qtype == "nf4" else (most / 7).astype(w.dtype)
        codes = jnp.round(split / step * 7) + 8 if qtype == "nf4" else jnp.round(split / step)
        codes = codes.reshape(w.shape).astype(jnp.uint4 if qtype == "nf4" else jnp.int4)
        zero = jnp.ones(step.shape, jnp.int4).squeeze(-2) if has_zero else None
        return Qwix(codes, step.squeeze(-2), zero, qtype, 2)

    return of


def depth(w: Any) -> int:
    """How many axes of a weight are a stack's, if its last two are a matrix."""
    return w.ndim - 2


# By name: with the last two axes as a matrix, and what is in front a stack; or without a stack.
FORMATS: dict[str, Callable[[Any], Any]] = {
    "nf4": lambda w: nf4(w, -2, depth(w), block=2),
    "nf4 single, turned": lambda w: nf4(w, -1, depth(w), block=2, double=False),
    "nf4 flat": lambda w: nf4(w, -2, depth(w)),
    "nf4 whole": lambda w: nf4(w, 1, 0, block=4),
    "int8": lambda w: int8(w, -2, depth(w)),
    "int8 whole": lambda w: int8(w, range(w.ndim - 1), 0),
    "float8": lambda w: float8(w, -2, depth(w)),
    "float8 turned": lambda w: float8(w, -1, depth(w)),
    "Q4_0": gguf("Q4_0"),
    "Q5_1": gguf("Q5_1"),
    "Q8_0": gguf("Q8_0"),
    "qwix nf4": qwix("nf4", False),
    "qwix int4": qwix("int4", True),
}
