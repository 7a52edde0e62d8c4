"""A decoder of many families in plain Flax, how it generates text, and how its weights are laid out."""

from rslora_jax.models.attention import init_cache, lengthen
from rslora_jax.models.configs import LLAMA2_7B, LLAMA31_8B, LLAMA33_70B
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, Embed, Layer
from rslora_jax.models.decoder_config import DecoderConfig
from rslora_jax.models.generation import Generation, generate, stream
from rslora_jax.models.layout import stack_layers, unstack_adapters, unstack_layers
from rslora_jax.models.remat import REMAT_POLICIES
from rslora_jax.models.rope import RopeScaling

__all__ = [
    "LLAMA2_7B",
    "LLAMA31_8B",
    "LLAMA33_70B",
    "REMAT_POLICIES",
    "SHARDING_RULES",
    "Decoder",
    "DecoderConfig",
    "Embed",
    "Generation",
    "Layer",
    "RopeScaling",
    "generate",
    "init_cache",
    "lengthen",
    "stack_layers",
    "stream",
    "unstack_adapters",
    "unstack_layers",
]
