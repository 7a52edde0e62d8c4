"""Write the safetensors format tensor by tensor, in shards, so that no more than one need be held."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_UNITS = {
    "": 1,
    **{f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**n for n, k in enumerate("KMGT", 1)},
}


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


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Deal names out in their order into shards of at most so many bytes; a larger tensor has one of its own.

    >>> split({"a": 3, "b": 4, "c": 9, "d": 1}, 7)
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


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    make: Callable[[str], np.ndarray],
    *,
    most: int = 5_000_000_000,
) -> list[Path]:
    """Write tensors of one dtype as Hugging Face's `model.safetensors`, or as several files and an index.

    Args:
      folder: where to write.
      shapes: the shape of every tensor, by name, in the order in which they are made.
      dtype: "bfloat16", "float16" or "float32".
      make: gives the tensor of a name; asked for each once, when its turn has come.
      most: bytes in a file.
    """
    width = jnp.dtype(dtype).itemsize
    sizes = {name: math.prod(shape) * width for name, shape in shapes.items()}
    shards = split(sizes, most)
    label = lambda n: f"-{n:05}-of-{len(shards):05}" if len(shards) > 1 else ""
    files = [folder / f"model{label(n)}.safetensors" for n in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write(file, names, shapes, dtype, make)
    if len(files) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(sizes.values()), "total_parameters": sum(map(math.prod, shapes.values()))},
            "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write(
    file: Path,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    make: Callable[[str], np.ndarray],
) -> None:
    # The format: the header's length as 8 bytes, the header as JSON filled up with blanks to a multiple of 8, the
    # tensors row by row, little end first. transformers reads only files that name a framework.
    width = jnp.dtype(dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * width
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in names:
            tensor = make(name)
            if tensor.shape != tuple(shapes[name]) or tensor.dtype != jnp.dtype(dtype):
                raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, and {dtype}{shapes[name]} was said")
            # Bytes, as they lie (JAX runs on little-endian machines alone): dtypes unknown to numpy have no buffer.
            out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
