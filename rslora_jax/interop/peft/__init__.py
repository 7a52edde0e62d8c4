"""PEFT's adapter folders, read and written: adapter_config.json and adapter_model.safetensors."""

from rslora_jax.interop.peft.config import base_of, read_config
from rslora_jax.interop.peft.files import PeftFolder
from rslora_jax.interop.peft.load import Loaded, load_peft, open_peft, replace
from rslora_jax.interop.peft.save import save_peft
from rslora_jax.interop.peft.vllm import check_options, check_server, check_vllm

__all__ = [
    "Loaded",
    "PeftFolder",
    "base_of",
    "check_options",
    "check_server",
    "check_vllm",
    "load_peft",
    "open_peft",
    "read_config",
    "replace",
    "save_peft",
]
