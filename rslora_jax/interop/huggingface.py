"""Read a model's folder as Hugging Face's transformers writes it, and write what lies there beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from rslora_jax.interop.bitsandbytes import METHOD, check_method, packing_of_bits, with_companions
from rslora_jax.interop.families import family_of_config
from rslora_jax.interop.family import Family
from rslora_jax.interop.json_files import json_text, read_json
from rslora_jax.interop.model import Model, Progress, Shardings, shardings_of
from rslora_jax.interop.names import Names
from rslora_jax.interop.own_tokenizer import check_rows, read_or_none
from rslora_jax.interop.packing import warn_of_unpacked
from rslora_jax.interop.quantising import quantising
from rslora_jax.interop.shards import open_folder
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.interop.tokenizer_files import read_tokenizer, tokenizer_files
from rslora_jax.interop.weights import check_sizes, load_weights, warn_not_finite

_CONFIG = "config.json"
_QUANTISED = "quantization_config"
GENERATION = "generation_config.json"
_TAKEN = ("bos_token_id", "pad_token_id")


def load_huggingface(
    folder: str | Path,
    *,
    scan_layers: bool = False,
    remat: str | None = None,
    param_dtype: DTypeLike = jnp.float32,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings = None,
    family: Family | None = None,
    names: Names | None = None,
    progress: Progress | None = None,
    text: bool = True,
    dequantize: bool = False,
    quantize: str | None = None,
    attention: str | None = None,
) -> Model:
    """Load (config, variables, tokenizer) from a folder of the families Llama, Mistral, Qwen 2 and 3, and Gemma 1 to 3.

    Args:
      folder: has `config.json`, `tokenizer.json` and `model.safetensors`, or an index and its shards.
      scan_layers: stack the layers' weights: kernels are (in, out), then (layers, in, out).
      remat: as in `DecoderConfig`, like `dtype`.
      param_dtype: what the weights are rounded to.
      dtype: what is computed in.
      shardings: where the weights are to lie (`interop.model.Shardings`); each device's part is read straight onto it.
      family: which family's folder it is; by default the one of `families.FAMILIES` that reads its `model_type`.
      names: the table of names, where it is not the family's.
      progress: called with the bytes that are done, and all.
      text, dequantize, quantize, attention: as of `load_model`.

    Raises:
      ValueError: the folder is no whole model, or one that would be computed wrongly here; file and field or tensor are
        named. Dropout, which transformers applies in training alone, is not looked at.
    """
    folder = Path(folder)
    how: dict[str, Any] = dict(scan_layers=scan_layers, remat=remat, param_dtype=param_dtype, dtype=dtype)
    how |= {"attention": attention} if attention else {}  # a family need not know of it
    family, config = read_model_config(folder, family, **how)
    tokenizer = read_or_none(lambda: _tokenizer(folder, config.vocab_size), text)
    is_packed = is_quantised(folder)
    if is_packed and quantize:
        raise ValueError(f"{folder} is quantised already, by {METHOD}: read it as it is, and do not quantise it again")
    tensors: Mapping[str, Any] = open_folder(folder, integers=is_packed)
    tensors = with_companions(tensors) if is_packed else tensors
    names = family.names if names is None else names
    check_sizes(tensors, family.outline(config), names, str(folder))
    config, changed = family.suited(config, tensors) if family.suited else (config, {})
    shapes = family.shapes(config)
    ignored, unpacked, broken = family.ignored, list[str](), dict[str, Any]()
    packing = quantising(quantize) if quantize else packing_of_bits(unpacked, broken)
    variables = load_weights(
        tensors,
        shapes,
        shardings_of(shardings, shapes),
        names=names,
        ignored=lambda name: ignored is not None and ignored(config, name),
        source=str(folder),
        progress=progress,
        packing=None if dequantize else packing,
    )
    warn_not_finite(broken, jnp.dtype(param_dtype))
    warn_of_unpacked(folder, unpacked)
    return Model(config, variables, tokenizer, family, changed)


def read_model_config(folder: str | Path, family: Family | None = None, **how: Any) -> tuple[Family, Any]:
    """Read `config.json`: (the family, the configuration). Arguments and errors as in `load_huggingface`."""
    path = Path(folder) / _CONFIG
    about = _about(path)
    family = family or family_of_config(path, about)
    if check_method(path, about):
        about = {name: value for name, value in about.items() if name != _QUANTISED}
    return family, family.read_config(path, about, **how)


def is_quantised(folder: str | Path) -> bool:
    """Say whether a model's folder says that its weights are in fewer bits; errors as of `load_huggingface`."""
    return check_method(Path(folder) / _CONFIG, _about(Path(folder) / _CONFIG))


def family_of_folder(folder: str | Path) -> Family:
    """Give the family of a model's folder; errors as of `load_huggingface`."""
    path = Path(folder) / _CONFIG
    return family_of_config(path, _about(path))


def files_beside_weights(
    config: Any,
    tokenizer: Tokenizer | None,
    dtype: str,
    family: Family,
    base: Path | None = None,
    changed: Mapping[str, Any] = MappingProxyType({}),
    quantised: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Give the text of the files of a folder beside its weights, by name.

    Where there is the folder of a `base`, only its config.json, with the dtype, the `changed` fields and what it says
    of `quantised` weights changed, and its generation_config.json where that lacks a token at which generation stops
    here: its other files are copied.
    """
    of_weights = {} if quantised is None else {_QUANTISED: dict(quantised)}
    if base is not None:
        about = {name: value for name, value in read_json(base / _CONFIG).items() if name != _QUANTISED}
        files = {_CONFIG: json_text({**_with_dtype(about, dtype), **changed, **of_weights})}
        return files if tokenizer is None else files | _stops_of_base(base, tokenizer)
    if tokenizer is None:
        return {_CONFIG: json_text({**family.write_config(config, dtype), **of_weights})}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ids = {name: number for name, number in ids.items() if number is not None}
    return {
        _CONFIG: json_text(family.write_config(config, dtype) | of_weights | {"bos_token_id": None} | ids),
        GENERATION: json_text(ids | _one_or_all(tokenizer.stop_ids)),
        **tokenizer_files(tokenizer, config.max_len),
    }


def _stops_of_base(base: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Give the generation_config.json with the tokens that end an answer here and that the base does not name.

    A template may end turns with another token than the eos token of its model, as that of Qwen's bases: who trains on
    chats learns to stop there.
    """
    ends = _eos_ids(base)
    missing = [i for i in tokenizer.stop_ids if i not in ends]
    if not missing:
        return {}
    if (base / GENERATION).is_file():
        about = read_json(base / GENERATION)
    else:  # transformers then takes these of config.json, which it no longer looks at once there is this file
        about = {name: value for name, value in read_json(base / _CONFIG).items() if name in _TAKEN}
    return {GENERATION: json_text(about | _one_or_all((*ends, *missing)))}


def _one_or_all(ids: Sequence[int]) -> dict[str, Any]:
    return {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}


def _about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: give the folder of a Hugging Face model")
    return read_json(path)


def _with_dtype(about: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    # transformers 5 writes "dtype", and reads both.
    fields = [name for name in ("torch_dtype", "dtype") if name in about] or ["torch_dtype"]
    return {**about, **dict.fromkeys(fields, dtype)}


def _tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    ends = _eos_ids(folder)
    tokenizer = dataclasses.replace(read_tokenizer(folder, eos_id=ends[0] if ends else None), ends=ends)
    tokenizer = tokenizer.padded_within(vocab_size)
    check_rows(folder, tokenizer, vocab_size)
    return tokenizer


def _eos_ids(folder: Path) -> tuple[int, ...]:
    for name in (GENERATION, _CONFIG):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            ids = tuple(i for i in (found if isinstance(found, list) else [found]) if type(i) is int and i >= 0)
            if ids:
                return ids
    return ()
