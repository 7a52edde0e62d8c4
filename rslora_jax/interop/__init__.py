"""Models and adapters in the formats of others: GGUF, Hugging Face folders, PEFT."""

from rslora_jax.interop.peft import load_peft, read_config, save_peft

__all__ = ["load_peft", "read_config", "save_peft"]
