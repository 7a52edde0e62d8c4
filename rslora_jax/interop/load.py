"""Load a model by what a user calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rslora_jax.interop.gguf import GGUFModel, find_smollm2, load_gguf


def load_model(
    where: str | Path | None = None,
    *,
    scan_layers: bool = True,
    remat: str | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
) -> GGUFModel:
    """Load (config, variables, tokenizer): from a GGUF file, or SmolLM2-135M-Instruct where nothing is given.

    >>> config, variables, tokenizer = load_model()
    >>> config.width, tokenizer.vocab_size
    (576, 49152)
    """
    path = find_smollm2() if where is None else Path(where)
    return load_gguf(path, scan_layers=scan_layers, remat=remat, param_dtype=param_dtype, dtype=dtype)
