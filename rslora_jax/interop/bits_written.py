"""Write matrices in 4 and 8 bits as bitsandbytes reads them: what `interop.bitsandbytes` reads, the other way round."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.bitsandbytes import METHOD
from rslora_jax.stored import Stored, int8, nf4
from rslora_jax.stored.nf4 import BLOCK, LEVELS, NESTED_BLOCK, NESTED_LEVELS

# A matrix (out, in) in a format, by the format's name.
_MAKERS: Mapping[str, Callable[[Any], Stored]] = {
    "nf4": lambda rows: nf4(rows, axis=1),
    "int8": lambda rows: int8(rows, axis=1),
}
FORMS = tuple(_MAKERS)
_STATE_SIZE = 256  # of the JSON of a matrix, filled up with blanks: how long it is depends on a number in it


def few_bits(name: str, rows: np.ndarray, form: str, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Put a matrix in 4 or 8 bits.

    Args:
      name: the matrix's in the file.
      rows: float (out, in), of finite numbers.
      form: one of `FORMS`.
      dtype: what bitsandbytes is to make of it at its use.

    Returns:
      (the tensors in the file by name, the numbers in float32 that they stand for).
    """
    stored: Any = _MAKERS[form](jnp.asarray(rows.astype(np.float32)))
    numbers = np.asarray(stored.dense())
    if form == "int8":
        most = np.abs(rows.astype(np.float32)).max(1)
        most = np.where(most > 0, most, np.float32(1))
        return {
            name: np.asarray(stored.codes),
            f"{name}_format": np.array(0, np.uint8),
            f"{name.removesuffix('weight')}SCB": most,
        }, numbers
    told = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(rows.shape)}
    told |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(stored.offset)}
    codes = np.asarray(stored.codes).reshape(-1)[: -(-rows.size // 2)]  # without what fills the last block up
    return {
        name: codes[:, None],
        f"{name}.absmax": np.asarray(stored.absmax).reshape(-1),
        f"{name}.nested_absmax": np.asarray(stored.nested),
        f"{name}.nested_quant_map": NESTED_LEVELS,
        f"{name}.quant_map": np.array(LEVELS, np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(told).encode().ljust(_STATE_SIZE), np.uint8),
    }, numbers


def kinds_of(name: str, shape: tuple[int, ...], form: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Give the shapes and dtypes of the tensors that `few_bits` gives, before there are any."""
    out, width = shape
    blocks = -(-out * width // BLOCK)
    sizes: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (shape, np.int8),
        f"{name}_format": ((), np.uint8),
        f"{name.removesuffix('weight')}SCB": ((out,), np.float32),
    }
    if form == "nf4":
        sizes = {
            name: ((-(-math.prod(shape) // 2), 1), np.uint8),
            f"{name}.absmax": ((blocks,), np.uint8),
            f"{name}.nested_absmax": ((-(-blocks // NESTED_BLOCK),), np.float32),
            f"{name}.nested_quant_map": (NESTED_LEVELS.shape, np.float32),
            f"{name}.quant_map": ((len(LEVELS),), np.float32),
            f"{name}.quant_state.bitsandbytes__nf4": ((_STATE_SIZE,), np.uint8),
        }
    return {n: jax.ShapeDtypeStruct(size, kind) for n, (size, kind) in sizes.items()}


def quantization_config(form: str, dtype: str, skipped: Sequence[str]) -> dict[str, Any]:
    """Give what a model's config.json says of its weights.

    Args:
      form: one of `FORMS`.
      dtype: what is computed in.
      skipped: the modules that are not quantised.
    """
    return {
        "quant_method": METHOD,
        "load_in_4bit": form == "nf4",
        "load_in_8bit": form == "int8",
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": form == "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": dtype,
    }
