"""Rank-stabilised LoRA for JAX: adapters for any function, exact, cheap at every rank, only arrays."""

from rslora_jax.config import LoraConfig
from rslora_jax.nnx import from_nnx
from rslora_jax.scaling import gamma
from rslora_jax.sites import Site
from rslora_jax.wrap import Lora, RsloraWarning, wrap

__all__ = ["Lora", "LoraConfig", "RsloraWarning", "Site", "from_nnx", "gamma", "wrap"]
__version__ = "0.1.0"
