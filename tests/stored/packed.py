"""A model's weights in each of the library's formats."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from rslora_jax.stored import Gguf, float8, int8, nf4
from rslora_jax.stored.gguf import KINDS

# Where in a block of each kind its float16s are, and a size that makes numbers of about 0.1.
_HALVES = {
    **{"Q4_0": ((0,), 0.01), "Q4_1": ((0, 2), 0.01), "Q5_0": ((0,), 0.005), "Q5_1": ((0, 2), 0.005)},
    **{"Q8_0": ((0,), 0.001), "Q4_K": ((0, 2), 0.0003), "Q6_K": ((208,), 0.00003)},
}
FORMS = ("nf4", "nf4 single", "int8", "float8", *KINDS)


def packed(form: str, path: str, w: Any) -> Any:
    """Return a matrix, or a stack of them, in a format; a table's rows are its own, and the rest stays as it is.

    Blocks of GGUF have numbers of their own, drawn at random.
    """
    if "kernel" not in path and "embedding" not in path:
        return w
    axis, depth = int("embedding" in path), w.ndim - 2
    if form in KINDS:
        return random_blocks(form, w.shape, axis, w.dtype, seed=len(path))
    made = {"nf4": nf4, "nf4 single": lambda *of: nf4(*of, double=False), "int8": int8, "float8": float8}
    return made[form](w, axis, depth)


def random_blocks(kind: str, shape: tuple[int, ...], axis: int, dtype: Any = "float32", seed: int = 0) -> Gguf:
    """Return a weight (*stack, rows, columns) of random blocks along one of its last two axes."""
    rng, (block, size, _) = np.random.default_rng(seed), KINDS[kind]
    *stack, rows, columns = shape
    others, along = (columns, rows) if axis == 0 else (rows, columns)
    data = rng.integers(0, 256, (*stack, others, along // block, size), dtype=np.uint8)
    places, scale = _HALVES[kind]
    for place in places:
        halves = (scale * rng.standard_normal(data.shape[:-1])).astype(np.float16)
        data[..., place : place + 2] = halves[..., None].view(np.uint8)
    data = data.reshape(*stack, others, -1)
    data = np.ascontiguousarray(np.swapaxes(data, -1, -2)) if axis == 0 else data
    return Gguf(jnp.asarray(data), None, (rows, columns), jnp.dtype(dtype), axis, (kind,))
