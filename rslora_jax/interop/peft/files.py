"""The two files of a PEFT adapter, read with care and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LARGEST_CONFIG = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: give a folder that PEFT's save_pretrained wrote")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: no adapter's configuration is so large")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: save the adapter again with PEFT")
    return found


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """Read adapter_model.safetensors as numpy arrays by name.

    Raises:
      ValueError: it is not there, damaged, or holds another dtype than float32, bfloat16 and float16.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        if (pickled := path.with_suffix(".bin")).is_file():
            raise ValueError(
                f"{pickled} is a pickle, and reading it could run any code: load it with PEFT where you trust it, and "
                "save it again with safe_serialization=True"
            )
        raise ValueError(f"{path} is not there: give a folder that PEFT's save_pretrained wrote")
    safetensors = require_safetensors()
    try:
        listed = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:200]}): copy or download it again") from error
    found = {}
    for name, entry in listed:
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {shown(name)} is of dtype {entry['dtype']}: save it as float32, bfloat16 or float16"
            )
        dtype = jnp.dtype(DTYPES[entry["dtype"]])
        found[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return found


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write adapter_model.safetensors."""
    require_safetensors()
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path = folder / WEIGHTS_NAME
    path.touch()
    mode = path.stat().st_mode
    save_file(whole, path, metadata={"format": "pt"})
    path.chmod(mode)  # newer versions put a file of the owner's alone in its place


def require_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("PEFT adapters need the package safetensors: pip install 'rslora_jax[hf]'") from error
    return safetensors


# The end of an adapter's tensor, after its module's name: of a layer, or of a token table.
FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")


def adapted_in(folder: str | Path) -> set[str]:
    """Return the modules for which an adapter's file has factors."""
    matches = (FACTOR.fullmatch(name.removeprefix(PREFIX)) for name in read_tensors(folder))
    return {found[1] for found in matches if found}


def shown(name: str) -> str:
    """Write a name from a file so that it fits into a message.

    >>> shown("a" * 200) == "a" * 97 + "..."
    True
    """
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= 100 else name[:97] + "..."
