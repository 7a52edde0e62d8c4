"""Read and write safetensors files tensor by tensor, a few rows at a time, and nothing from a file that is not sound.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, the header in JSON, which
gives each tensor's dtype, shape and place, and the data, little end first. Rows are read and not mapped: mapped files
count as memory, and one that is cut short while it is read would end the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.json_files import parse_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype("bfloat16"),
}
_HEADER_LIMIT = 100_000_000  # bytes, as the format's own library has it


class Tensor(NamedTuple):
    """A tensor in a file: where it is, and what."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows `first` to `stop` along the first axis."""
        return self._read(first * math.prod(self.shape[1:]), (stop - first, *self.shape[1:]))

    def whole(self) -> np.ndarray:
        """Read all of it, which may be a scalar."""
        return self._read(0, self.shape)

    def _read(self, first: int, shape: tuple[int, ...]) -> np.ndarray:
        count = math.prod(shape) * self.dtype.itemsize
        found = np.fromfile(self.path, np.uint8, count, offset=self.start + first * self.dtype.itemsize)
        if found.size != count:
            raise ValueError(f"{self.path} was cut off within {self.name} while it was read: start again")
        return found.view(self.dtype).reshape(shape)


def open_file(path: Path) -> dict[str, Tensor]:
    """Find the tensors of one file by name; only its header is read.

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
        header = parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, about, size - 8 - length, 8 + length) for name, about in header.items()}


def write_file(path: Path, kinds: Mapping[str, jax.ShapeDtypeStruct], make: Callable[[str], np.ndarray]) -> None:
    """Write one file, of which no more than one tensor is held at a time.

    Args:
      path: the file.
      kinds: shape and dtype of every tensor, by name, in the order in which they are made.
      make: gives the tensor of a name; asked for each once, when its turn has come.

    Raises:
      ValueError: a tensor is of a dtype that the format lacks, or not what `kinds` says.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # transformers reads only files that name a framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in kinds.items():
        if kind.dtype not in names:
            raise ValueError(f"{name} is of {kind.dtype}, and only {', '.join(map(str, names))} are written")
        start, end = end, end + math.prod(kind.shape) * kind.dtype.itemsize
        header[name] = {"dtype": names[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data lie at a multiple of 8
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, kind in kinds.items():
            tensor = make(name)
            if tensor.shape != kind.shape or tensor.dtype != kind.dtype:
                raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, and {kind.dtype}{kind.shape} was said")
            # Bytes, as they lie (JAX runs on little-endian machines alone): dtypes unknown to numpy have no buffer.
            out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _tensor(path: Path, name: str, about: Any, data: int, start: int) -> Tensor:
    about = about if isinstance(about, dict) else {}
    dtype, shape, place = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
        raise ValueError(f"{path} is damaged: its header says no dtype, shape and place of tensor {name}")
    if dtype not in DTYPES:
        raise ValueError(
            f"{path} holds tensor {name} as {dtype}, and only {', '.join(DTYPES)} are read: take the model that is "
            "not quantised"
        )
    if place[1] - place[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{path} is damaged: tensor {name} of shape {tuple(shape)} has {place[1] - place[0]} bytes")
    if place[1] > data:
        raise ValueError(
            f"{path} is cut off within tensor {name}, which ends at byte {start + place[1]}: download it again"
        )
    return Tensor(path, name, DTYPES[dtype], tuple(shape), start + place[0])


def _are_counts(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
