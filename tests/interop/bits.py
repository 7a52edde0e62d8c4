"""Weights in 4 and 8 bits as bitsandbytes writes them, and the numbers that they are, by numpy alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.stored.nf4 import NESTED_LEVELS  # which tests compare with the library's own
from tests.interop import folders

# arXiv 2305.14314, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
LEVELS = {"nf4": np.float32(NF4), "fp4": np.float32([*FP4, *(-level for level in FP4)])}


def four_bits(rng: Any, name: str, shape: tuple[int, int], kind: str, block: int = 64, nested: bool = True) -> Any:
    """Draw a matrix in 4 bits: its tensors by name."""
    size = math.prod(shape)
    blocks = -(-size // block)
    told = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(shape)}
    found = {name: rng.integers(0, 256, (-(-size // 2), 1), dtype=np.uint8), f"{name}.quant_map": LEVELS[kind]}
    if nested:
        told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0375}
        found[f"{name}.absmax"] = rng.integers(0, 256, blocks, dtype=np.uint8)
        found[f"{name}.nested_absmax"] = rng.uniform(0.01, 0.03, -(-blocks // 256)).astype(np.float32)
        found[f"{name}.nested_quant_map"] = NESTED_LEVELS
    else:
        found[f"{name}.absmax"] = rng.uniform(0.01, 0.3, blocks).astype(np.float32)
    text = json.dumps(told).encode()
    return found | {f"{name}.quant_state.bitsandbytes__{kind}": np.frombuffer(text, np.uint8)}


def eight_bits(rng: Any, name: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Draw a matrix of int8: its tensors by name."""
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    most = rng.uniform(0.1, 0.3, shape[0]).astype(np.float32)
    return {name: codes, name.removesuffix("weight") + "SCB": most, f"{name}_format": np.uint8(0)}


def numbers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the matrices of a folder as float32, by name, each number looked up for itself."""
    found = {}
    for name, array in arrays.items():
        kind = next((k for k in LEVELS if f"{name}.quant_state.bitsandbytes__{k}" in arrays), None)
        if kind is not None:
            found[name] = _numbers_of(arrays, name, kind)
        elif name.removesuffix("weight") + "SCB" in arrays and name.endswith("weight"):
            scale = arrays[name.removesuffix("weight") + "SCB"] / np.float32(127)
            found[name] = array.astype(np.float32) * scale[:, None]
        elif array.dtype.kind not in "iu" and not any(name.endswith(end) for end in ("absmax", "quant_map", ".SCB")):
            found[name] = array.astype(np.float32)
    return found


def _numbers_of(arrays: dict[str, np.ndarray], name: str, kind: str) -> np.ndarray:
    told = json.loads(bytes(arrays[f"{name}.quant_state.bitsandbytes__{kind}"]))
    data = np.frombuffer(arrays[name].tobytes(), np.uint8)
    codes = np.array([half for byte in data for half in (byte >> 4, byte & 15)], np.uint8)
    absmax = arrays[f"{name}.absmax"]
    if "nested_offset" in told:
        each = arrays[f"{name}.nested_absmax"][np.arange(len(absmax)) // 256]
        absmax = arrays[f"{name}.nested_quant_map"][absmax] * each + np.float32(told["nested_offset"])
    at = np.arange(math.prod(told["shape"]))
    return (arrays[f"{name}.quant_map"][codes[at]] * absmax[at // told["blocksize"]]).reshape(told["shape"])


def write(folder: Path, form: Any, config: dict[str, Any] | None = None, **said: Any) -> dict[str, np.ndarray]:
    """Write a whole model whose layers' matrices are in few bits; return all its tensors.

    `form(rng, name, shape)` gives the tensors of a matrix, or None where it is to be float32.
    """
    folders.write(folder, config)
    config = json.loads((folder / "config.json").read_text())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | said
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    arrays = matrices(config, form)
    (folder / "model.safetensors").write_bytes(folders.safetensors(arrays))
    return arrays


def matrices(config: dict[str, Any], form: Any) -> dict[str, np.ndarray]:
    """Draw a model's tensors, those of the layers' matrices by `form`."""
    rng, arrays = np.random.default_rng(1), {}
    for name, array in folders.tensors(config).items():
        is_inside = array.ndim == 2 and ".layers." in name
        own = form(rng, name, array.shape) if is_inside else None
        arrays |= own or {name: array}
    return arrays
