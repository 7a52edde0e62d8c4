"""Read and write the weights of a Hugging Face folder: one safetensors file, or several and an index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rslora_jax.interop.json_files import read_json
from rslora_jax.interop.safetensors import Tensor, open_file, write_file
from rslora_jax.shown import quoted, shown

DTYPES = ("bfloat16", "float16", "float32")  # that are written

# The file of weights, or where there are several the index of them.
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_UNITS = {
    "": 1,
    **{f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**n for n, k in enumerate("KMGT", 1)},
}


def open_folder(folder: Path, *, integers: bool = False) -> dict[str, Tensor]:
    """Find all tensors of a model's folder: in `model.safetensors`, or in the shards that its index names.

    Args:
      folder: the model's.
      integers: as of `safetensors.open_file`.

    Raises:
      ValueError: there are none, or a file is cut off, damaged or not as the index says; file and tensor are named.
    """
    if (folder / WHOLE).exists():
        return open_file(folder / WHOLE, integers=integers)
    index = folder / INDEX
    if not index.exists():
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} has weights only as .bin files, which run code when they are read: save the model again "
                "with transformers' save_pretrained(safe_serialization=True)"
            )
        raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}: give the folder of a whole model")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files: download it again")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        # The index comes from a stranger: it may name files beside it and no others.
        if shard in ("", ".", "..") or len(shard) > 100 or not shard.isprintable() or any(c in shard for c in "/\\:"):
            raise ValueError(f"{index} names {quoted(shard)}, which is not a file beside it: do not trust this model")
        for name, tensor in open_file(folder / shard, integers=integers).items():
            if name in found:
                raise ValueError(
                    f"{tensor.path} and {found[name].path.name} both hold {shown(name)}: download them again"
                )
            found[name] = tensor
    for name, shard in shards.items():
        if name not in found or found[name].path.name != shard:
            raise ValueError(
                f"{folder / shard} lacks tensor {shown(name)}, which the index says is there: download it again"
            )
    return found


def write_folder(
    folder: Path,
    weights: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    make: Callable[[str], np.ndarray],
    *,
    most: int = 5_000_000_000,
) -> list[Path]:
    """Write weights as `model.safetensors`, or as several files and an index.

    Args:
      folder: where to write.
      weights: shape and dtype of each tensor, by name, that every weight is in the files; they stay in one file. In
        the order in which they are made.
      make: gives the tensor of a name; asked for each once, when its turn has come.
      most: bytes in a file.
    """
    sizes = {name: sum(math.prod(k.shape) * k.dtype.itemsize for k in own.values()) for name, own in weights.items()}
    shards = _deal_out(sizes, most)
    files = [folder / WHOLE]
    if len(shards) > 1:
        files = [folder / f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    places: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        kinds = {tensor: kind for name in names for tensor, kind in weights[name].items()}
        write_file(file, kinds, make)
        places |= dict.fromkeys(kinds, file.name)
    if len(shards) > 1:
        about = {"total_size": sum(sizes.values())}
        if len(places) == len(weights):  # of companions, entries are no parameters
            about["total_parameters"] = sum(math.prod(k.shape) for own in weights.values() for k in own.values())
        index: dict[str, Any] = {"metadata": about, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def parse_size(text: str) -> int:
    """Read a number of bytes: KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size("800")
    (5000000000, 1610612736, 800)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return size


def _deal_out(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Deal names out in their order into shards of at most so many bytes; a larger tensor has one of its own.

    >>> _deal_out({"a": 3, "b": 4, "c": 9, "d": 1}, 7)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not shards or size > left:
            shards.append([])
            left = most
        shards[-1].append(name)
        left -= size
    return shards
