"""The family of decoders that `models.decoder` computes: Llama, Mistral, Qwen, Gemma and their kin."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from rslora_jax.interop import decoder_config, decoder_gguf
from rslora_jax.interop.family import Family, Untied
from rslora_jax.interop.names import Names, Weight
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, Embed, Layer
from rslora_jax.models.decoder_config import DecoderConfig

# PyTorch's matrices are (out, in), where Flax's kernels are (in, out).
_MATRICES = {
    "attn/q_proj/kernel": "self_attn.q_proj.weight",
    "attn/k_proj/kernel": "self_attn.k_proj.weight",
    "attn/v_proj/kernel": "self_attn.v_proj.weight",
    "attn/o_proj/kernel": "self_attn.o_proj.weight",
    "mlp/gate_proj/kernel": "mlp.gate_proj.weight",
    "mlp/up_proj/kernel": "mlp.up_proj.weight",
    "mlp/down_proj/kernel": "mlp.down_proj.weight",
}
_VECTORS = {
    "attn_norm/scale": "input_layernorm.weight",
    "attn/q_proj/bias": "self_attn.q_proj.bias",
    "attn/k_proj/bias": "self_attn.k_proj.bias",
    "attn/v_proj/bias": "self_attn.v_proj.bias",
    "attn/q_norm/scale": "self_attn.q_norm.weight",
    "attn/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attn_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_pre_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}


def _in_layers(own: dict[str, str], *, transposed: bool) -> Names:
    """Name the weights of every layer, looped or stacked."""
    return {
        f"params/{layers}/{path}": Weight(f"model.layers.{{i}}.{name}", transposed)
        for layers in ("layers_{i}", "layers")
        for path, name in own.items()
    }


def _ignored(config: DecoderConfig, name: str) -> bool:
    """Say whether a tensor may be there: some write a tied head, and early conversions the rotary frequencies."""
    return (config.tie_head and name == "lm_head.weight") or name.endswith(".rotary_emb.inv_freq")


def _untie(config: DecoderConfig, variables: dict[str, Any]) -> Untied:
    """Give the model with a head of its own."""
    kernel_DxV = jnp.asarray(variables["params"]["embed"]["embedding"]).T
    own = {**variables, "params": variables["params"] | {"lm_head": {"kernel": kernel_DxV}}}
    paths = ("params/embed/embedding", "params/lm_head/kernel")
    return Untied(dataclasses.replace(config, tie_head=False), own, *paths, {"tie_word_embeddings": False})


DECODER = Family(
    model_types=decoder_config.MODEL_TYPES,
    read_config=decoder_config.read_decoder_config,
    write_config=decoder_config.write_decoder_config,
    build=Decoder,
    names={
        "params/embed/embedding": Weight("model.embed_tokens.weight"),
        "params/embed/embedding@product": Weight("lm_head.weight"),  # where the table is the head
        "params/norm/scale": Weight("model.norm.weight"),
        "params/lm_head/kernel": Weight("lm_head.weight", transposed=True),
        **_in_layers(_MATRICES, transposed=True),
        **_in_layers(_VECTORS, transposed=False),
    },
    ignored=_ignored,
    untie=_untie,
    sharding_rules=SHARDING_RULES,
    blocks=(Embed, Layer),
    gguf=decoder_gguf.FORM,
)
