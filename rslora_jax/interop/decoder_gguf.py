"""How GGUF files of architecture "llama" hold a decoder: its figures, its weights' names, the order of rows."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rslora_jax.interop.family import GgufForm
from rslora_jax.interop.names import Names, Weight
from rslora_jax.models.decoder_config import DecoderConfig

_HEAD = "output.weight"
_MATRICES = {
    "attn/q_proj/kernel": "attn_q.weight",
    "attn/k_proj/kernel": "attn_k.weight",
    "attn/v_proj/kernel": "attn_v.weight",
    "attn/o_proj/kernel": "attn_output.weight",
    "mlp/gate_proj/kernel": "ffn_gate.weight",
    "mlp/up_proj/kernel": "ffn_up.weight",
    "mlp/down_proj/kernel": "ffn_down.weight",
}
_NORMS = {"attn_norm/scale": "attn_norm.weight", "mlp_norm/scale": "ffn_norm.weight"}

_NAMES: Names = {
    "params/embed/embedding": Weight("token_embd.weight"),
    "params/norm/scale": Weight("output_norm.weight"),
    "params/lm_head/kernel": Weight(_HEAD, transposed=True),
    **{
        f"params/{layers}/{path}": Weight(f"blk.{{i}}.{name}", name not in _NORMS.values())
        for layers in ("layers_{i}", "layers")
        for path, name in (_MATRICES | _NORMS).items()
    },
}


def _read_gguf_config(path: Path, metadata: Mapping[str, Any], tensors: Container[str], **how: Any) -> DecoderConfig:
    """Read a decoder's configuration.

    Args:
      path: of the file, for errors.
      metadata: its entries by name.
      tensors: the names of its tensors.
      how: scan_layers, remat, param_dtype and dtype of the `DecoderConfig`.

    Raises:
      ValueError: an entry is missing, or asks for what is not computed here; it is named.
    """

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{name}", default)
        if isinstance(value, list):
            raise ValueError(f"{path} has llama.{name} for each layer apart: only one for all is read")
        if value is None:
            raise ValueError(f"{path} lacks llama.{name}: take a file that was converted whole")
        return value

    def number(name: str, of: Any, default: Any = None) -> Any:
        value = get(name, default)
        if type(value) is not of or not value > 0:
            raise ValueError(f"{path} has llama.{name}={value!r}: a number above 0 is expected")
        return value

    heads, width = number("attention.head_count", int), number("embedding_length", int)
    head_dim = number("attention.key_length", int, width // heads)
    for name, plain in (
        ("rope.scaling.type", "none"),
        # Without a type llama.cpp takes a factor as linear; the second name is the older one.
        ("rope.scaling.factor", 1.0),
        ("rope.scale_linear", 1.0),
        ("expert_count", 0),
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
    ):
        if (found := get(name, plain)) != plain:
            raise ValueError(f"{path} has llama.{name}={found!r}: only {plain!r} is computed here")
    figures = dict(
        vocab_size=number("vocab_size", int, len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        width=width,
        mlp_width=number("feed_forward_length", int),
        num_layers=number("block_count", int),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rope_base=number("rope.freq_base", float, 10000.0),
        norm_eps=number("attention.layer_norm_rms_epsilon", float),
        max_len=number("context_length", int),
        tie_head=_HEAD not in tensors,
    )
    try:
        return DecoderConfig(**figures, **how)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _row_order(config: DecoderConfig, name: str) -> np.ndarray | None:
    """Say which rows of q and k stand where: llama.cpp has pairs side by side, Hugging Face halves.

    >>> config = DecoderConfig(vocab_size=8, width=6, mlp_width=8, num_layers=1, num_heads=1, num_kv_heads=1)
    >>> _row_order(config, "blk.0.attn_q.weight").tolist()
    [0, 2, 4, 1, 3, 5]
    """
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    return np.arange(heads * config.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


FORM = GgufForm(architecture="llama", read_config=_read_gguf_config, names=_NAMES, row_order=_row_order)
