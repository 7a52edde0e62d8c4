"""The two files of a PEFT adapter, read with care and once, and written."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rslora_jax.interop.json_files import read_json
from rslora_jax.interop.safetensors import DTYPES, not_finite, open_file, write_file
from rslora_jax.shown import shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_MISSING = "is not there: give a folder that PEFT's save_pretrained wrote"


@dataclasses.dataclass(frozen=True, eq=False)
class PeftFolder:
    """An adapter's folder: `fields`, the content of its adapter_config.json, and its tensors."""

    folder: Path
    fields: Mapping[str, Any]

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of adapter_model.safetensors by name, read when they are first asked for.

        Raises:
          ValueError: it is not there, damaged, or holds another dtype than float32, bfloat16 and float16.
        """
        return _read_tensors(self.folder / WEIGHTS_NAME)


def as_opened(folder: str | Path | PeftFolder) -> PeftFolder:
    """Read the adapter_config.json of a folder, where that has not been done.

    Raises:
      ValueError: it cannot be read as a JSON object.
    """
    if isinstance(folder, PeftFolder):
        return folder
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{path} {_MISSING}")
    return PeftFolder(Path(folder), read_json(path))


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        if (pickled := path.with_suffix(".bin")).is_file():
            raise ValueError(
                f"{pickled} is a pickle, and reading it could run any code: load it with PEFT where you trust it, and "
                "save it again with safe_serialization=True"
            )
        raise ValueError(f"{path} {_MISSING}")
    found = open_file(path)
    for name, tensor in found.items():
        if tensor.dtype == DTYPES["F64"]:
            raise ValueError(f"{path}: {shown(name)} is of dtype F64: save it as float32, bfloat16 or float16")
    tensors = {name: tensor.whole() for name, tensor in found.items()}
    for name, array in tensors.items():
        if not_finite(array):
            raise ValueError(f"{path}: {shown(name)} holds numbers that are not finite: the adapter is broken")
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write adapter_model.safetensors, the widest numbers first, so that each lies at a multiple of its size."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    kinds = {name: jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype) for name in order}
    write_file(folder / WEIGHTS_NAME, kinds, tensors.__getitem__)


# The end of an adapter's tensor, after its module's name: of a layer, or of a token table.
FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B)|lora_magnitude_vector)")


def adapted_in(peft: PeftFolder) -> set[str]:
    """Return the modules for which an adapter's file has factors."""
    return {found[1] for found in _factors(peft)}


def tables_in(peft: PeftFolder) -> set[str]:
    """Return the modules for which an adapter's file has the factors of an embedding."""
    return {found[1] for found in _factors(peft) if found[3]}


def _factors(peft: PeftFolder) -> list[re.Match[str]]:
    matches = (FACTOR.fullmatch(name.removeprefix(PREFIX)) for name in peft.tensors)
    return [found for found in matches if found]
