"""Models and adapters in the formats of others: GGUF, Hugging Face folders, PEFT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.families import FAMILIES
from rslora_jax.interop.family import Family, GgufForm
from rslora_jax.interop.load import find_family, load_model
from rslora_jax.interop.model import Model
from rslora_jax.interop.names import Names, Weight
from rslora_jax.interop.peft import check_vllm, load_peft, read_config, replace, save_peft

if TYPE_CHECKING:
    from rslora_jax.interop.gguf import find_smollm2, load_gguf
    from rslora_jax.interop.huggingface import load_huggingface
    from rslora_jax.interop.merged import write_merged
    from rslora_jax.interop.tokenizer import Tokenizer
    from rslora_jax.interop.tokenizer_files import read_tokenizer

# What needs the extra `train`, which is imported when it is asked for.
_LATER = {
    "Tokenizer": "tokenizer",
    "find_smollm2": "gguf",
    "load_gguf": "gguf",
    "load_huggingface": "huggingface",
    "read_tokenizer": "tokenizer_files",
    "with_tokens": "enlarged",
    "write_merged": "merged",
}

__all__ = [
    "DECODER",
    "FAMILIES",
    "Family",
    "GgufForm",
    "Model",
    "Names",
    "Tokenizer",
    "Weight",
    "check_vllm",
    "find_family",
    "find_smollm2",
    "load_gguf",
    "load_huggingface",
    "load_model",
    "load_peft",
    "read_config",
    "read_tokenizer",
    "replace",
    "save_peft",
    "with_tokens",
    "write_merged",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
