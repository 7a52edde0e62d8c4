"""PEFT's adapter folders, read and written: adapter_config.json and adapter_model.safetensors."""

from rslora_jax.interop.peft.config import base_of, read_config
from rslora_jax.interop.peft.load import Loaded, check_files, load_peft, replace
from rslora_jax.interop.peft.save import save_peft
from rslora_jax.interop.peft.vllm import check_vllm

__all__ = ["Loaded", "base_of", "check_files", "check_vllm", "load_peft", "read_config", "replace", "save_peft"]
