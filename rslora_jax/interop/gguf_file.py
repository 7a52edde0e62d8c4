"""Read GGUF files: their metadata, and their tensors some rows at a time.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the magic, version and counts; metadata, each a
name, a type and a value; for each tensor its name, shape, type and place; and the data, little end first. Of the
library `gguf` only what undoes quantisation is used: its reader does not notice that a file ends too early.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from rslora_jax.shown import quoted, reason_of, shown

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, where the file does not say
_STRING, _ARRAY = 8, 9
_LONGEST_HEADER = 1 << 25  # bytes: the largest vocabularies take half of it, and lists take many times theirs
_MOST_AXES = 4  # as ggml has it
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor in a file: where it is, and what. Its rows are float32.

    `order` says which row of the file is each row here; None where it is the same.
    """

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    order: np.ndarray | None = None
    dtype = np.dtype(np.float32)

    @property
    def row_bytes(self) -> int:
        """The bytes that a row, along the last axis, takes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size if self.shape else size

    @property
    def num_bytes(self) -> int:
        """The bytes that all of it takes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows `first` to `stop` along the first axis, with the quantisation undone."""
        if len(self.shape) < 2:  # a vector is one row in the file
            return self._numbers(self._lines(0, 1)).reshape(self.shape)[first:stop]
        each = self._ordered(first, stop)
        return self._numbers(each).reshape(stop - first, *self.shape[1:])

    def packed(self) -> np.ndarray:
        """Read a matrix's rows as the bytes that they take in the file: uint8 (rows, row_bytes)."""
        return self._ordered(0, self.shape[0])

    def _ordered(self, first: int, stop: int) -> np.ndarray:
        each = math.prod(self.shape[1:-1])
        if self.order is None:
            return self._lines(first * each, stop * each)
        wanted = self.order[first:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        lines = self._lines(low * each, high * each).reshape(high - low, -1)[wanted - low]
        return lines.reshape(-1, self.row_bytes)

    def _lines(self, first: int, stop: int) -> np.ndarray:
        count = (stop - first) * self.row_bytes
        found = np.fromfile(self.path, np.uint8, count, offset=self.start + first * self.row_bytes)
        if found.size != count:
            raise ValueError(f"{self.path} was cut off within {shown(self.name)} while it was read: start again")
        return found.reshape(stop - first, self.row_bytes)

    def _numbers(self, lines: np.ndarray) -> np.ndarray:
        try:
            return dequantize(lines, self.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {shown(self.name)} is stored as {self.kind.name}, which cannot be dequantised "
                "here: take another quantisation of the model"
            ) from error


class GgufFile(NamedTuple):
    """A file's metadata and tensors, by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Truncated(Exception):
    """A read past the end of the file."""


class _Header:
    """Takes one value after the other from the beginning of a file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > self.size:
            raise _Truncated
        if self.at > _LONGEST_HEADER:
            raise ValueError(f"its header has more than {_LONGEST_HEADER} bytes")
        return self.file.read(count)

    def scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_form(kind))
        of, count = self.scalar("I"), self.scalar("Q")
        if of == _STRING:
            return [self.string() for _ in range(count)]
        form = np.dtype(f"<{_form(of)}")
        return np.frombuffer(self.take(count * form.itemsize), form).tolist()


def read_gguf(path: Path) -> GgufFile:
    """Read a file's metadata, and find its tensors.

    Raises:
      ValueError: the file is missing, no GGUF file, cut off, damaged, or of a version that is not known.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a .gguf file")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _Header(file, size)
        if size < 4 or header.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: give one made by llama.cpp's converter")
        try:
            metadata, tensors = _read(path, header)
        except _Truncated:
            raise ValueError(f"{path} has {size} bytes and is cut off within its header: download it again") from None
        except (ValueError, RecursionError, struct.error, MemoryError, OverflowError) as error:
            raise ValueError(
                f"{path} is damaged or of a new version ({reason_of(error)}): download it again"
            ) from error
    for tensor in tensors.values():
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise ValueError(
                f"{path} has {size} bytes and is cut off within tensor {shown(tensor.name)}, which ends at byte {end}: "
                "download it again"
            )
    return GgufFile(metadata, tensors)


def _read(path: Path, header: _Header) -> GgufFile:
    version = header.scalar("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} or big end first" if not version & 65535 else f"version {version}")
    tensor_count, entry_count = header.scalar("Q"), header.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        name = header.string()
        if name in metadata:
            raise ValueError(f"{shown(name)} is there twice")
        metadata[name] = header.value(header.scalar("I"))
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name = header.string()
        if name in tensors:
            raise ValueError(f"tensor {shown(name)} is there twice")
        if (axes := header.scalar("I")) > _MOST_AXES:
            raise ValueError(f"tensor {shown(name)} has {axes} axes")
        shape = tuple(reversed([header.scalar("Q") for _ in range(axes)]))
        kind, start = GGMLQuantizationType(header.scalar("I")), header.scalar("Q")
        if shape and shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(
                f"tensor {shown(name)} of shape {quoted(shape)} is no whole number of blocks of {kind.name}"
            )
        tensors[name] = GgufTensor(path, name, kind, shape, start)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {quoted(alignment)}")
    _check_places(tensors, alignment)
    data = -(-header.at // alignment) * alignment
    return GgufFile(metadata, {name: dataclasses.replace(t, start=data + t.start) for name, t in tensors.items()})


def _check_places(tensors: Mapping[str, GgufTensor], alignment: int) -> None:
    """Refuse tensors that share bytes, or with others between them, as llama.cpp does."""
    end = 0
    for tensor in tensors.values():
        if tensor.start != end:
            raise ValueError(f"tensor {shown(tensor.name)} is at byte {tensor.start} of the data in place of {end}")
        end += -(-tensor.num_bytes // alignment) * alignment


def _form(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _SCALARS[kind]
