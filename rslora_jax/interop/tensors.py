"""Read tensors from safetensors files, a few rows at a time, and nothing from a file that is not sound.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, the header in JSON, which
gives each tensor's dtype, shape and place, and the data. Rows are read and not mapped: mapped files count as memory,
and one that is cut short while it is read would end the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes, as the format's own library has it
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype("bfloat16"),
}


class Tensor(NamedTuple):
    """A tensor in a file: where it is, and what."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows `first` to `stop` along the first axis."""
        row = math.prod(self.shape[1:])
        count = (stop - first) * row * self.dtype.itemsize
        found = np.fromfile(self.path, np.uint8, count, offset=self.start + first * row * self.dtype.itemsize)
        if found.size != count:
            raise ValueError(f"{self.path} was cut off within {self.name} while it was read: start again")
        return found.view(self.dtype).reshape(stop - first, *self.shape[1:])

    def chunks(self, first: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Read rows `first` to `stop` in pieces of about `size` bytes, each with the number of its first row."""
        step = max(1, size // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for row in range(first, stop, step):
            yield row, self.rows(row, min(row + step, stop))


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Find all tensors of a model's folder: in `model.safetensors`, or in the shards that its index names.

    Raises:
      ValueError: there are none, or a file is cut off, damaged or not as the index says; file and tensor are named.
    """
    if (folder / "model.safetensors").exists():
        return open_file(folder / "model.safetensors")
    index = folder / INDEX
    if not index.exists():
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} has weights only as .bin files, which run code when they are read: save the model again "
                "with transformers' save_pretrained(safe_serialization=True)"
            )
        raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}: give the folder of a whole model")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files: download it again")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        # The index comes from a stranger: it may name files beside it and no others.
        if shard in (".", "..") or not shard.isprintable() or any(c in shard for c in "/\\:"):
            raise ValueError(f"{index} names {shard!r}, which is not a file beside it: do not trust this model")
        for name, tensor in open_file(folder / shard).items():
            if name in found:
                raise ValueError(f"{tensor.path} and {found[name].path.name} both hold {name}: download them again")
            found[name] = tensor
    for name, shard in shards.items():
        if name not in found or found[name].path.name != shard:
            raise ValueError(f"{folder / shard} lacks tensor {name}, which the index says is there: download it again")
    return found


def open_file(path: Path) -> dict[str, Tensor]:
    """Find the tensors of one safetensors file.

    Raises:
      ValueError: the file is missing, cut off or damaged, or holds a tensor of a dtype that is not read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: download the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (length <= _HEADER_LIMIT and length > size - 8):
            raise ValueError(f"{path} has {size} bytes and is cut off within its header: download it again")
        if length > _HEADER_LIMIT:
            raise ValueError(f"{path} says that its header has {length} bytes: it is no safetensors file, or damaged")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, about, size - 8 - length, 8 + length) for name, about in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
      ValueError: it cannot be read or holds something else.
    """
    try:
        return _json(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error


def _json(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    try:
        found = json.loads(text.decode(), object_pairs_hook=once)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its JSON cannot be read ({error})") from error
    return found


def _tensor(path: Path, name: str, about: Any, data: int, start: int) -> Tensor:
    whole = lambda numbers, count=None: (
        isinstance(numbers, list)
        and all(type(n) is int and n >= 0 for n in numbers)
        and (count is None or len(numbers) == count)
    )
    about = about if isinstance(about, dict) else {}
    dtype, shape, place = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not whole(shape) or not whole(place, 2):
        raise ValueError(f"{path} is damaged: its header says no dtype, shape and place of tensor {name}")
    if dtype not in _DTYPES:
        raise ValueError(
            f"{path} holds tensor {name} as {dtype}, and only {', '.join(_DTYPES)} are read: take the model that is "
            "not quantised"
        )
    if place[1] - place[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{path} is damaged: tensor {name} of shape {tuple(shape)} has {place[1] - place[0]} bytes")
    if place[1] > data:
        raise ValueError(
            f"{path} is cut off within tensor {name}, which ends at byte {start + place[1]}: download it again"
        )
    return Tensor(path, name, _DTYPES[dtype], tuple(shape), start + place[0])
