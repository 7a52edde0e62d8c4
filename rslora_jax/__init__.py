"""Rank-stabilised LoRA for JAX: adapters for any function, exact, cheap at every rank, only arrays.

The core is here. Around it: `methods` (what an adapter is), `starts` (how it starts), `stored` (what a base weight is),
`train`, `store` (checkpoints), `parallel` (meshes), `interop` (the formats of others), `models`, `analysis`. What is
public of each is in its `__all__`.
"""

import importlib
from typing import Any

from rslora_jax.adapters import Adapters
from rslora_jax.config import LoraConfig
from rslora_jax.methods import Method
from rslora_jax.nnx import from_nnx
from rslora_jax.scaling import gamma
from rslora_jax.several import combine, per_example, stack
from rslora_jax.sites import Site
from rslora_jax.stored import Stored
from rslora_jax.stored.quantize import quantize
from rslora_jax.wrap import Lora, RsloraWarning, wrap

__all__ = [
    "Adapters",
    "Lora",
    "LoraConfig",
    "Method",
    "RsloraWarning",
    "Site",
    "Stored",
    "combine",
    "from_nnx",
    "gamma",
    "load",
    "per_example",
    "quantize",
    "save",
    "stack",
    "wrap",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Give the room `starts`, and what writes and reads folders, when they are first asked for."""
    if name == "starts":
        return importlib.import_module("rslora_jax.starts")
    if name in ("save", "load"):
        return getattr(importlib.import_module("rslora_jax.store.one_call"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
