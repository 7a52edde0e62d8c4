"""Sizes of published decoders."""

from __future__ import annotations

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
