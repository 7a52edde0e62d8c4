"""Weights in 4 and 8 bits as bitsandbytes writes them into a Hugging Face folder: a matrix and its companions.

Of 4 bits: beside `weight` (bytes of two codes, the first in the high half, through the whole matrix row by row) its
`weight.absmax` (of each block the largest magnitude; or in 8 bits with `nested_absmax` and `nested_quant_map`),
`weight.quant_map` (the sixteen levels) and `weight.quant_state.bitsandbytes__nf4` (JSON). Of 8 bits: beside `weight`
(int8) the largest magnitude of each row, `SCB`. https://github.com/bitsandbytes-foundation/bitsandbytes, `QuantState`
and `Linear8bitLt`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.interop.json_files import parse_json
from rslora_jax.interop.packing import Packed, Packing, stacked_shapes
from rslora_jax.interop.safetensors import Tensor
from rslora_jax.interop.tensors import Source
from rslora_jax.shown import quoted, shown
from rslora_jax.stored import NF4, Int8, Stored
from rslora_jax.stored.nf4 import LEVELS, NESTED_BLOCK, NESTED_LEVELS

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_FP4 = (0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25)
# By the code, whose highest bit is the sign.
_LEVELS = {"nf4": LEVELS, "fp4": (*_FP4, *(-level for level in _FP4))}
_ROWS = 0  # the one order of an int8 matrix that is written today
_LARGEST_STATE = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class FourBits:
    """A matrix in 4 bits; its rows are read in float32.

    Attributes:
      codes, absmax: the tensors.
      nested, offset: of magnitudes in 8 bits the largest of each 256, and their mean; else None and 0.
      shape: of the matrix, (out, in).
      block: how many numbers are in a block.
      levels: the sixteen.
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: float
    shape: tuple[int, ...]
    block: int
    levels: tuple[float, ...]
    dtype = np.dtype(np.float32)

    @property
    def path(self) -> Path:
        """The file."""
        return self.codes.path

    @property
    def name(self) -> str:
        """Its name there."""
        return self.codes.name

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows with the quantisation undone."""
        start, end = first * self.shape[1], stop * self.shape[1]
        data = self.codes.bytes(start // 2, (end + 1) // 2)
        codes = np.stack([data >> 4, data & 15], -1).reshape(-1)[start % 2 :][: end - start]
        scales = self._magnitudes[np.arange(start, end) // self.block]
        return (np.array(self.levels, np.float32)[codes] * scales).reshape(-1, self.shape[1])

    @functools.cached_property
    def _magnitudes(self) -> np.ndarray:
        """The largest magnitude of each block."""
        if self.nested is None:
            return self.absmax.whole()
        each = np.repeat(self.nested.whole(), NESTED_BLOCK)[: self.absmax.shape[0]]
        return NESTED_LEVELS[self.absmax.whole()] * each + np.float32(self.offset)

    @property
    def form(self) -> tuple[Any, ...]:
        """What layers of a stack are to have in common."""
        return self.shape, self.block, self.levels, self.nested is None

    def stored(self, dtype: Any, is_turned: bool) -> NF4:
        """Read it packed, with host arrays; a kernel (in, out) where it is turned."""
        out, width = self.shape
        is_flat = bool(width % self.block)
        codes, absmax = self.codes.bytes(0, -(-out * width // 2)), self.absmax.whole()
        if is_flat:
            codes = np.pad(codes, (0, len(absmax) * self.block // 2 - len(codes)))
        else:
            codes, absmax = (array.reshape(out, -1) for array in (codes, absmax))
            codes, absmax = (np.ascontiguousarray(a.T) if is_turned else a for a in (codes, absmax))
        inner, axis = (self.shape[::-1], 0) if is_turned else (self.shape, 1)
        nested = None if self.nested is None else self.nested.whole()
        offset = None if self.nested is None else np.float32(self.offset)
        how = dict(is_flat=is_flat, block=self.block, levels=self.levels)
        return NF4(codes, absmax, nested, offset, inner, jnp.dtype(dtype), axis, **how)  # type: ignore[arg-type]

    def is_finite(self, dtype: Any) -> bool:
        """Say whether all its numbers are finite in a dtype."""
        return _all_within(self._magnitudes, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class EightBits:
    """A matrix of int8, with the largest magnitude of each row; its rows are read in float32."""

    codes: Tensor
    most: Tensor
    dtype = np.dtype(np.float32)

    @property
    def path(self) -> Path:
        """The file."""
        return self.codes.path

    @property
    def name(self) -> str:
        """Its name there."""
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, (out, in)."""
        return self.codes.shape

    @property
    def form(self) -> tuple[Any, ...]:
        """What layers of a stack are to have in common."""
        return (self.shape,)

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Read rows with the quantisation undone."""
        return self.codes.rows(first, stop).astype(np.float32) * (self.most.whole() / np.float32(127))[first:stop, None]

    def stored(self, dtype: Any, is_turned: bool) -> Int8:
        """Read it packed, with host arrays; a kernel (in, out) where it is turned."""
        codes, scale = self.codes.whole(), (self.most.whole() / np.float32(127))[:, None]
        codes, scale = (np.ascontiguousarray(a.T) if is_turned else a for a in (codes, scale))
        return Int8(codes, scale, jnp.dtype(dtype))  # type: ignore[arg-type]

    def is_finite(self, dtype: Any) -> bool:
        """Say whether all its numbers are finite in a dtype."""
        return _all_within(self.most.whole(), dtype)


def check_method(path: Path, about: Mapping[str, Any]) -> bool:
    """Say whether a model's config.json says that its weights are quantised.

    Raises:
      ValueError: they are so by another method than is read.
    """
    found = about.get("quantization_config")
    if found is None:
        return False
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method is None and isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = METHOD  # as it was written before there were other methods
    if method != METHOD:
        raise ValueError(
            f"{path} has quantization_config with quant_method={quoted(method)}, and only {METHOD} is read: take the "
            "model that is not quantised, and quantise it as it is read"
        )
    return True


def with_companions(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put the tensors of a folder together: a matrix and its companions become one, under the matrix's name.

    Raises:
      ValueError: a companion is missing, too many, of another size than it is to be, or says what is not computed here.
    """
    found, used = dict[str, Any](), set[str]()
    for name, tensor in tensors.items():
        if (state := next((s for kind in _LEVELS if (s := f"{name}{_STATE}{kind}") in tensors), None)) is not None:
            found[name] = _four_bits(tensors, tensor, state, used)
        elif name.endswith(".weight") and (most := f"{name.removesuffix('weight')}SCB") in tensors:
            found[name] = _eight_bits(tensors, tensor, most, used)
    for name, tensor in tensors.items():
        if name in found or name in used:
            continue
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{tensor.path} holds tensor {shown(name)} as {tensor.dtype}, which belongs to no matrix that {METHOD} "
                "has in 4 or 8 bits: download the model again"
            )
        found[name] = tensor
    return found


def packing_of_bits(unpacked: list[str], broken: dict[str, Any]) -> Packing:
    """Give the packing that keeps matrices in 4 and 8 bits as they are; arguments as of `packing_of_gguf`."""

    def packing(path: str, leaf: jax.ShapeDtypeStruct, source: Source) -> Packed | None:
        tensors = [tensor for tensor in source.tensors if isinstance(tensor, (FourBits, EightBits))]
        if not tensors:
            return None
        if len(tensors) < len(source.tensors) or len({(type(t), t.form) for t in tensors}) > 1:
            unpacked.extend(tensor.name for tensor in tensors)
            return None

        def element(n: int) -> Stored:
            if not tensors[n].is_finite(leaf.dtype):
                broken[tensors[n].name] = tensors[n]
            return tensors[n].stored(leaf.dtype, source.is_turned)

        return Packed(stacked_shapes(element(0), len(tensors) if source.is_stack else None), element, source.is_stack)

    return packing


def _all_within(magnitudes: np.ndarray, dtype: Any) -> bool:
    """Say whether a dtype holds numbers of such magnitudes."""
    return bool((np.abs(magnitudes) <= float(jnp.finfo(dtype).max)).all())  # which no NaN is


def _companion(tensors: Mapping[str, Tensor], of: Tensor, name: str, used: set[str]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{of.path}: tensor {shown(of.name)} is in 4 or 8 bits and lacks {shown(name)} beside it")
    used.add(name)
    return tensors[name]


def _sized(tensor: Tensor, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype.name not in dtypes or tensor.shape != shape:
        raise ValueError(
            f"{tensor.path}: tensor {shown(tensor.name)} is {tensor.dtype}{quoted([*tensor.shape])} where the matrix "
            f"beside it asks for {' or '.join(dtypes)}{quoted([*shape])}: download the model again"
        )
    return tensor


def _four_bits(tensors: Mapping[str, Tensor], codes: Tensor, state: str, used: set[str]) -> FourBits:
    kind, told = state.rpartition("__")[2], _state(_companion(tensors, codes, state, used))
    shape, block = _figures(codes, kind, told)
    levels = _companion(tensors, codes, f"{codes.name}.quant_map", used)
    _check_levels(_sized(levels, ("float32",), (16,)), np.array(_LEVELS[kind], np.float32))
    numbers = math.prod(shape)
    if codes.num_bytes != -(-numbers // 2):
        raise ValueError(
            f"{codes.path}: tensor {shown(codes.name)} has {codes.num_bytes} bytes where a matrix of shape "
            f"{quoted(shape)} in 4 bits has {-(-numbers // 2)}: download the model again"
        )
    blocks = -(-numbers // block)
    absmax = _companion(tensors, codes, f"{codes.name}.absmax", used)
    if "nested_offset" not in told:
        absmax = _sized(absmax, ("float32",), (blocks,))
        return FourBits(codes, absmax, None, 0.0, shape, block, _LEVELS[kind])
    offset, nested_block = told["nested_offset"], told.get("nested_blocksize")
    if type(offset) not in (int, float) or not abs(offset) < 1e30 or nested_block != NESTED_BLOCK:
        raise ValueError(
            f"{codes.path}: tensor {shown(state)} has nested_offset={quoted(offset)} and "
            f"nested_blocksize={quoted(nested_block)}: a number and {NESTED_BLOCK} are read"
        )
    nested = _companion(tensors, codes, f"{codes.name}.nested_absmax", used)
    nested_levels = _companion(tensors, codes, f"{codes.name}.nested_quant_map", used)
    _check_levels(_sized(nested_levels, ("float32",), (len(NESTED_LEVELS),)), NESTED_LEVELS)
    absmax, nested = (
        _sized(absmax, ("uint8",), (blocks,)),
        _sized(nested, ("float32",), (-(-blocks // NESTED_BLOCK),)),
    )
    return FourBits(codes, absmax, nested, float(offset), shape, block, _LEVELS[kind])


def _state(tensor: Tensor) -> dict[str, Any]:
    """Read the JSON that is in a tensor."""
    if tensor.dtype != np.uint8 or len(tensor.shape) != 1 or tensor.shape[0] > _LARGEST_STATE:
        raise ValueError(f"{tensor.path}: tensor {shown(tensor.name)} is no text: download the model again")
    try:
        return parse_json(tensor.path, tensor.whole().tobytes())
    except ValueError as error:
        raise ValueError(f"{error}: that of tensor {shown(tensor.name)}") from error


def _figures(codes: Tensor, kind: str, told: Mapping[str, Any]) -> tuple[tuple[int, int], int]:
    """Give the shape of a matrix and the size of its blocks."""
    shape, block = told.get("shape"), told.get("blocksize")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    if not is_shape or type(block) is not int or not 1 < block < 1 << 20 or block % 2 or told.get("quant_type") != kind:
        raise ValueError(
            f"{codes.path}: the quant_state of tensor {shown(codes.name)} has quant_type="
            f"{quoted(told.get('quant_type'))}, shape={quoted(shape)} and blocksize={quoted(block)}: {kind}, two sizes "
            "and an even number are read"
        )
    return (shape[0], shape[1]), block  # type: ignore[index]


def _check_levels(tensor: Tensor, known: np.ndarray) -> None:
    if not np.array_equal(tensor.whole(), known):
        raise ValueError(
            f"{tensor.path}: tensor {shown(tensor.name)} has other levels than {METHOD}'s own: they are not read"
        )


def _eight_bits(tensors: Mapping[str, Tensor], codes: Tensor, most: str, used: set[str]) -> EightBits:
    if codes.dtype != np.int8 or len(codes.shape) != 2:
        raise ValueError(
            f"{codes.path}: tensor {shown(codes.name)} is {codes.dtype}{quoted([*codes.shape])} and has {shown(most)} "
            "beside it: a matrix of int8 is expected"
        )
    order = f"{codes.name}_format"
    if order in tensors:
        place = _sized(_companion(tensors, codes, order, used), ("uint8",), ())
        if int(place.whole()) != _ROWS:
            raise ValueError(
                f"{codes.path}: tensor {shown(order)} is {int(place.whole())}: only {_ROWS}, row by row, is read"
            )
    return EightBits(codes, _sized(_companion(tensors, codes, most, used), ("float32",), codes.shape[:1]))
