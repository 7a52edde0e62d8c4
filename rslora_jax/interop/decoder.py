"""The family of decoders that `models.decoder` computes: Llama, Mistral, Qwen, Gemma and their kin."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rslora_jax.interop import decoder_config, decoder_gguf, decoder_written
from rslora_jax.interop.family import Family, Untied
from rslora_jax.interop.names import Names, Weight
from rslora_jax.interop.tensors import Tensor
from rslora_jax.interop.weights import same_numbers
from rslora_jax.models.decoder import SHARDING_RULES, Decoder, Embed, Layer
from rslora_jax.models.decoder_config import DecoderConfig
from rslora_jax.stored import dense

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
    return (config.tie_head and name == _HEAD) or name.endswith(".rotary_emb.inv_freq")


def _suited(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> tuple[DecoderConfig, dict[str, Any]]:
    """Untie a head that the file has beside the token table with other numbers, as transformers 5 does.

    Raises:
      ValueError: the head is not tied, and there is none.
    """
    table, head = tensors.get(_TABLE), tensors.get(_HEAD)
    if config.tie_head and table is not None and head is not None and not same_numbers(table, head):
        print(
            f"{head.path}: {_HEAD} is not the token table, though tie_word_embeddings says so: it is read as a head of "
            "its own",
            file=sys.stderr,
            flush=True,
        )
        return dataclasses.replace(config, tie_head=False), {"tie_word_embeddings": False}
    if not config.tie_head and table is not None and head is None:
        raise ValueError(
            f"{table.path.parent} lacks tensor {_HEAD}, and tie_word_embeddings is false: it is not whole, or its "
            "token table is the head, and its config.json is to say true"
        )
    return config, {}


def _untie(config: DecoderConfig, variables: dict[str, Any]) -> Untied:
    """Give the model with a head of its own, which is an array."""
    kernel_DxV = jnp.asarray(dense(variables["params"]["embed"]["embedding"])).T
    own = {**variables, "params": variables["params"] | {"lm_head": {"kernel": kernel_DxV}}}
    paths = ("params/embed/embedding", "params/lm_head/kernel")
    return Untied(dataclasses.replace(config, tie_head=False), own, *paths, {"tie_word_embeddings": False})


def _vocabulary(config: DecoderConfig) -> dict[str, int]:
    """Give where the tokens' rows are, and along which axis."""
    return {"params/embed/embedding": 0} | ({} if config.tie_head else {"params/lm_head/kernel": 1})


def _outline(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Give the shapes of the table and of the last layer's matrices, or of all layers' where they are stacked."""
    c, q, kv = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"attn/k_proj": (c.width, kv), "attn/q_proj": (c.width, q), "mlp/up_proj": (c.width, c.mlp_width)}
    layers, stack = ("layers", (c.num_layers,)) if c.scan_layers else (f"layers_{c.num_layers - 1}", ())
    of_layers = {f"params/{layers}/{path}/kernel": (*stack, *shape) for path, shape in sizes.items()}
    return {"params/embed/embedding": (c.vocab_size, c.width)} | of_layers


DECODER = Family(
    model_types=decoder_config.MODEL_TYPES,
    read_config=decoder_config.read_decoder_config,
    write_config=decoder_written.write_decoder_config,
    build=Decoder,
    names={
        "params/embed/embedding": Weight(_TABLE),
        "params/embed/embedding@product": Weight(_HEAD),  # where the table is the head
        "params/norm/scale": Weight("model.norm.weight"),
        "params/lm_head/kernel": Weight(_HEAD, transposed=True),
        **_in_layers(_MATRICES, transposed=True),
        **_in_layers(_VECTORS, transposed=False),
    },
    ignored=_ignored,
    untie=_untie,
    vocabulary=_vocabulary,
    suited=_suited,
    sharding_rules=SHARDING_RULES,
    blocks=(Embed, Layer),
    gguf=decoder_gguf.FORM,
    outline=_outline,
)
