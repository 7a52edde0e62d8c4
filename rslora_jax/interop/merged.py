"""Write a model with its adapters added in, as the folder that Hugging Face's tools load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from rslora_jax.interop import streamed
from rslora_jax.interop.bits_written import FORMS, few_bits, kinds_of, quantization_config
from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.family import Family
from rslora_jax.interop.huggingface import GENERATION, files_beside_weights
from rslora_jax.interop.json_files import json_text, read_json
from rslora_jax.interop.kept_tokenizer import copy_tokenizer, is_whole
from rslora_jax.interop.names import Names, Place, is_looped, places
from rslora_jax.interop.new_folder import written_whole
from rslora_jax.interop.rounding import Rounding
from rslora_jax.interop.shards import DTYPES, write_folder
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.pytrees import Params
from rslora_jax.sites import named_leaves
from rslora_jax.stored.form import dense, element, is_stored
from rslora_jax.wrap import Adapters, Lora


def write_merged(
    folder: str | Path,
    lora: Lora,
    variables: Params,
    adapters: Adapters,
    *,
    config: Any,
    tokenizer: Tokenizer | None,
    dtype: str = "bfloat16",
    rest: str = "bfloat16",
    family: Family = DECODER,
    names: Names | None = None,
    base: str | Path | None = None,
    changed: Mapping[str, Any] = MappingProxyType({}),
    own_tokenizer: str | Path | None = None,
    max_shard_size: int = 5_000_000_000,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Rounding]:
    """Write W + gamma A B for every adapted weight, and all other weights, as a Hugging Face folder.

    One tensor is made at a time: its sum is formed in float64 and rounded once to `dtype`. The folder is written whole
    or not at all.

    Args:
      folder: where to write; it must be new or empty.
      lora: from `wrap`, on the model of `config`.
      variables: the base, in the dtype and the form in which it was trained on; what is stored becomes dense tensor by
        tensor.
      adapters: the adapters, in any layout that `lora` takes.
      config, tokenizer: the model's own, from `load_model`; without a tokenizer no files of one are made.
      dtype: "bfloat16", "float16" or "float32"; or "nf4" or "int8", which puts the layers' matrices in 4 or 8 bits, as
        bitsandbytes has them.
      rest: of these two, the dtype of all other weights.
      family: the model's own, from `load_model`.
      names: the Hugging Face name of every weight and whether it is stored transposed, where that is not the family's.
      base: the Hugging Face folder that the base was loaded from, if it was: its config.json, with only the dtype
        changed, its generation_config.json (with the tokens at which generation stops here, where it lacks one) and
        the files of its tokenizer are taken in place of ones made here.
      changed: fields of the base's config.json that are others in the model, as of `Model`.
      own_tokenizer: a folder with a tokenizer that the adapters were trained with in place of the base's: its files are
        copied as they are; what it says alone of the base's tokens is written into the base's.
      max_shard_size: bytes in a file of weights.
      progress: told the number of tensors done and their number in all.

    Returns:
      What rounding did to each adapted matrix, in the order of the base.

    Raises:
      ValueError: a weight is not finite or overflows `dtype` (it is named), the adapters do not fit, a weight has no
        Hugging Face name, or the folder is not free.
    """
    form, dtype = (dtype, rest) if dtype in FORMS else (None, dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: use {', '.join((*DTYPES, *FORMS))}")
    base = None if base is None else Path(base)
    lora.check(variables, adapters)
    leaves = named_leaves(variables)
    names = family.names if names is None else names
    found = places(names, {path: leaf.shape for path, leaf in leaves.items()})
    shapes = {name: _file_shape(place, leaves[place.path].shape) for name, place in found.items()}
    few = {name for name, place in found.items() if form and len(shapes[name]) == 2 and _is_in_layer(names, place)}
    weights = {
        name: kinds_of(name, shape, str(form)) if name in few else {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))}
        for name, shape in shapes.items()
    }
    owners = {tensor: name for name, own in weights.items() for tensor in own}
    roundings: list[Rounding] = []
    made: dict[str, np.ndarray] = {}  # of one weight
    done = 0

    def make(tensor: str) -> np.ndarray:
        nonlocal done
        if tensor not in made:
            name = owners[tensor]
            place, bits = found[name], form if name in few else None
            tensors, rounding = _merge_one(name, place, leaves[place.path], lora, adapters, dtype, bits)
            made.clear()
            made.update(tensors)
            roundings.extend([rounding] if rounding else [])
            done += 1
            progress(done, len(found))
        return made.pop(tensor)

    said = quantization_config(form, dtype, _not_in(shapes, few)) if form else None
    with written_whole(folder) as draft:
        progress(0, len(found))
        write_folder(draft, weights, make, most=max_shard_size)
        files = files_beside_weights(config, tokenizer, dtype, family, base, changed, said)
        for file, content in files.items():
            (draft / file).write_text(content, encoding="utf-8")
        if base is not None and (base / GENERATION).is_file() and not (draft / GENERATION).exists():
            shutil.copyfile(base / GENERATION, draft / GENERATION)
        _copy_tokenizer(tokenizer, base, None if own_tokenizer is None else Path(own_tokenizer), draft)
    return roundings


def _merge_one(
    name: str, place: Place, leaf: Any, lora: Lora, adapters: Adapters, dtype: str, form: str | None
) -> tuple[dict[str, np.ndarray], Rounding | None]:
    """Return a weight as it is in the files, tensors by name, and what rounding did to its update, if it has one."""
    weight = np.asarray(_dense(leaf if place.layer is None else element(leaf, place.layer)))
    site = lora.sites.get(place.path)
    if site is not None and site.layers and site.layer_axis == 0 and not site.layers[place.layer or 0].rank:
        site = None
    exact = weight if site is None else streamed.acting(weight, site, adapters[place.path], place.layer)
    if form is None:
        merged = streamed.rounded(name, exact, dtype)
        tensors = {name: place.to_file(merged)}
    else:
        tensors, numbers = few_bits(name, place.to_file(streamed.rounded(name, exact, "float32")), form, dtype)
        merged = place.to_file(numbers)  # there and back are the same
    return tensors, None if site is None else streamed.rounding_of(name, weight, exact, merged)


def _is_in_layer(names: Names, place: Place) -> bool:
    return place.layer is not None or is_looped(names, [place.path])


def _not_in(shapes: Mapping[str, tuple[int, ...]], few: Collection[str]) -> list[str]:
    """Return the modules whose matrices are not among these."""
    return sorted(name.rpartition(".")[0] for name, shape in shapes.items() if name not in few and len(shape) == 2)


_expanded = jax.jit(dense)  # compiled once for tensors that are alike


def _dense(weight: Any) -> Any:
    return _expanded(weight) if is_stored(weight) else weight


def _copy_tokenizer(tokenizer: Tokenizer | None, base: Path | None, own: Path | None, out: Path) -> None:
    """Copy the files of the tokenizer that is the model's; without a folder that has them they are made already."""
    if own is not None and is_whole(own):
        copy_tokenizer(own, out)
    elif base is not None:
        copy_tokenizer(base, out)
        if own is not None and tokenizer is not None:  # what is said of the base's tokens: an end and a template
            config = out / "tokenizer_config.json"
            about = read_json(config) if config.is_file() else {}
            about["eos_token"] = tokenizer.backend.id_to_token(tokenizer.eos_id)
            config.write_text(json_text(about), encoding="utf-8")
            if tokenizer.chat_template is not None:  # readers look here first
                (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _file_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = place.one(shape)
    return shape[::-1] if place.is_turned(len(shape)) else shape
