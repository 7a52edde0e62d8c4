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

from rslora_jax.interop.json_files import LARGEST_JSON, parse_json
from rslora_jax.shown import quoted, shown

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype("bfloat16"),
}
# Of weights in fewer bits, where they are asked for.
_INTEGERS: dict[str, np.dtype] = {"U8": np.dtype("u1"), "I8": np.dtype("i1")}


class Tensor(NamedTuple):
    """A tensor in a file: where it is, and what."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """How many bytes it has."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """The place behind its last byte."""
        return self.start + self.num_bytes

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows `first` to `stop` along the first axis."""
        return self._read(first * math.prod(self.shape[1:]), (stop - first, *self.shape[1:]))

    def whole(self) -> np.ndarray:
        """Read all of it, which may be a scalar."""
        return self._read(0, self.shape)

    def bytes(self, first: int, stop: int) -> np.ndarray:
        """Read some of its bytes, whatever they stand for."""
        found = np.fromfile(self.path, np.uint8, stop - first, offset=self.start + first)
        if found.size != stop - first:
            raise ValueError(f"{self.path} was cut off within {shown(self.name)} while it was read: start again")
        return found

    def _read(self, first: int, shape: tuple[int, ...]) -> np.ndarray:
        start, count = first * self.dtype.itemsize, math.prod(shape) * self.dtype.itemsize
        return self.bytes(start, start + count).view(self.dtype).reshape(shape)


def open_file(path: Path, *, integers: bool = False) -> dict[str, Tensor]:
    """Find the tensors of one file by name; only its header is read.

    Args:
      path: the file.
      integers: whether it may hold integers of 8 bits too, as those of weights in fewer bits are.

    Raises:
      ValueError: the file is missing, cut off or damaged, or holds a tensor of a dtype that is not read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: download the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (length <= LARGEST_JSON and length > size - 8):
            raise ValueError(f"{path} has {size} bytes and is cut off within its header: download it again")
        if length > LARGEST_JSON:
            raise ValueError(f"{path} says that its header has {length} bytes: it is no safetensors file, or damaged")
        header = parse_json(path, file.read(length))
    _check_texts(path, header)
    dtypes = DTYPES | (_INTEGERS if integers else {})
    found = {name: _tensor(path, name, about, size - 8 - length, 8 + length, dtypes) for name, about in header.items()}
    _check_places(path, found, 8 + length, size)
    return found


def write_file(path: Path, kinds: Mapping[str, jax.ShapeDtypeStruct], make: Callable[[str], np.ndarray]) -> None:
    """Write one file, of which no more than one tensor is held at a time.

    Args:
      path: the file.
      kinds: shape and dtype of every tensor, by name, in the order in which they are made.
      make: gives the tensor of a name; asked for each once, when its turn has come.

    Raises:
      ValueError: a tensor is of a dtype that the format lacks, or not what `kinds` says.
    """
    names = {dtype: name for name, dtype in (DTYPES | _INTEGERS).items()}
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


def not_finite(array: np.ndarray) -> bool:
    """Say whether an array of floats holds an infinity or no number.

    >>> not_finite(np.float32([1, np.inf])), not_finite(np.zeros(3, jnp.bfloat16))
    (True, False)
    """
    if array.dtype.itemsize > 2:
        return not np.isfinite(array).all()
    # By the exponent's bits, which is many times as quick as to ask of numbers of 16 bits.
    exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
    return bool(((array.view(np.uint16) & exponent) == exponent).any())


def _check_texts(path: Path, header: dict[str, Any]) -> None:
    """Take out what a header says beside its tensors, and check it and their names as the format's library does."""
    beside = header.pop("__metadata__", {})
    if not isinstance(beside, dict) or not all(isinstance(text, str) for text in beside.values()):
        raise ValueError(f"{path} is damaged: __metadata__ in its header is no object of texts")
    try:
        "".join((*header, *beside, *beside.values())).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} is damaged: its header holds half a surrogate pair") from error


def _check_places(path: Path, tensors: Mapping[str, Tensor], start: int, end: int) -> None:
    """Refuse tensors that share bytes, or bytes that are no tensor's: they would be read as other weights."""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != start:
            what = "overlaps the one before it" if tensor.start < start else "comes after bytes of no tensor"
            raise ValueError(f"{path} is damaged: tensor {shown(tensor.name)} {what}: download it again")
        start = tensor.stop
    if start != end:
        raise ValueError(f"{path} is damaged: its last {end - start} bytes are of no tensor: download it again")


def _tensor(path: Path, name: str, about: Any, data: int, start: int, dtypes: Mapping[str, np.dtype]) -> Tensor:
    about = about if isinstance(about, dict) else {}
    dtype, shape, place = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
        raise ValueError(f"{path} is damaged: its header says no dtype, shape and place of tensor {shown(name)}")
    if dtype not in dtypes:
        raise ValueError(
            f"{path} holds tensor {shown(name)} as {shown(dtype, 20)}, and only {', '.join(dtypes)} are read: take the "
            "model that is not quantised"
        )
    if place[1] - place[0] != math.prod(shape) * dtypes[dtype].itemsize:
        raise ValueError(
            f"{path} is damaged: tensor {shown(name)} of shape {quoted(tuple(shape))} has {place[1] - place[0]} bytes"
        )
    if place[1] > data:
        raise ValueError(
            f"{path} is cut off within tensor {shown(name)}, which ends at byte {start + place[1]}: download it again"
        )
    return Tensor(path, name, dtypes[dtype], tuple(shape), start + place[0])


def _are_counts(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
