"""Sizes of published decoders."""

from __future__ import annotations

import dataclasses

from rslora_jax.models import rope
from rslora_jax.models.decoder import DecoderConfig

# Llama 2 7B (arXiv 2307.09288): the model of the rsLoRA paper, 6,738,415,616 parameters. Layers are scanned, so that it
# traces and compiles as one, and all is bfloat16; `dataclasses.replace` changes either.
LLAMA2_7B = DecoderConfig(
    vocab_size=32000,
    width=4096,
    mlp_width=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    norm_eps=1e-5,
    max_len=4096,
    tie_head=False,
    scan_layers=True,
    param_dtype="bfloat16",
    dtype="bfloat16",
)

# Llama 3.1 8B and Llama 3.3 70B (arXiv 2407.21783), 8,030,261,248 and 70,553,706,496 parameters, in the same manner.
LLAMA31_8B = DecoderConfig(
    vocab_size=128256,
    width=4096,
    mlp_width=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    rope_base=500000.0,
    rope_scaling=rope.llama3(128, 500000.0, 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192),
    norm_eps=1e-5,
    max_len=131072,
    tie_head=False,
    scan_layers=True,
    param_dtype="bfloat16",
    dtype="bfloat16",
)
LLAMA33_70B = dataclasses.replace(LLAMA31_8B, width=8192, mlp_width=28672, num_layers=80, num_heads=64, head_dim=128)
