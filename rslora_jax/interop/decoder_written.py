"""The config.json of a decoder that came from no folder, as transformers reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rslora_jax.interop.decoder_config import read_decoder_config
from rslora_jax.models.decoder_config import DecoderConfig
from rslora_jax.models.rope import RopeScaling

_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "tie_head": "tie_word_embeddings",
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def write_decoder_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Give the content of a config.json, without the ids of special tokens: one that reads as this configuration.

    Raises:
      ValueError: no family of transformers has all that the model has.

    >>> config = DecoderConfig(vocab_size=8, width=4, mlp_width=8, num_layers=1, num_heads=1, num_kv_heads=1)
    >>> about = write_decoder_config(dataclasses.replace(config, qkv_bias=True), "float32")
    >>> about["model_type"], about["hidden_size"]
    ('qwen2', 4)
    """
    kind = _kind(config)
    about: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "rope_scaling": None if config.rope_scaling is None else _rope(config.rope_scaling),
        **({"hidden_act": "silu"} if not kind.startswith("gemma") else {}),
        **({"attention_bias": False} if kind != "qwen2" else {}),
        **({"mlp_bias": False} if kind == "llama" else {}),
        **_windows(config, kind),
        "torch_dtype": dtype,
    }
    if kind.startswith("gemma"):
        about |= dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    if config.rope_scaling is not None and config.rope_scaling.growth is not None:
        about["max_position_embeddings"] = config.rope_scaling.original_max_len
    _check(config, about)
    return about


def _kind(config: DecoderConfig) -> str:
    if config.norm_offset:
        return "gemma" if not config.post_norms else "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm or config.qkv_bias:
        return "qwen3" if config.qk_norm else "qwen2"
    return "llama" if config.window is None else "mistral"


def _rope(scaling: RopeScaling) -> dict[str, Any]:
    """Say how rotary embedding is stretched: one "longrope" for all rows is any way that does not look at them."""
    if scaling.growth is not None:
        return {"rope_type": "dynamic", "factor": scaling.growth}
    if len({*scaling.divisors}) == 1 and scaling.long_divisors is None and scaling.amplitude == 1:
        return {"rope_type": "linear", "factor": scaling.divisors[0]}
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": scaling.amplitude,
        "short_factor": list(scaling.divisors),
        "long_factor": list(scaling.long_divisors or scaling.divisors),
    }


def _windows(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """Give what a kind says of windows, of the sizes of scores, and of caps."""
    if kind in ("llama", "gemma"):
        return {}
    if kind == "mistral":
        return {"sliding_window": config.window}
    each = config.window_layers or (config.window is not None,) * config.num_layers
    found: dict[str, Any] = {
        "layer_types": ["sliding_attention" if near else "full_attention" for near in each],
        "sliding_window": config.window or 4096,  # of no layer where there is none
    }
    if kind.startswith("qwen"):
        return found | {"use_sliding_window": True} if config.window is not None else {}
    size = config.score_size or float(config.head_dim)
    found["query_pre_attn_scalar"] = int(size) if size == int(size) else size
    if kind == "gemma2":
        return found | {"attn_logit_softcapping": config.score_cap, "final_logit_softcapping": config.logit_cap}
    return found | {"rope_local_base_freq": config.window_rope_base or config.rope_base}


def _check(config: DecoderConfig, about: dict[str, Any]) -> None:
    """Refuse what is not read as it was meant."""
    here = dict(scan_layers=config.scan_layers, remat=config.remat, param_dtype=config.param_dtype, dtype=config.dtype)
    advice = (
        "cannot be written in a config.json here: load the base from a Hugging Face folder, whose own is then taken"
    )
    try:
        read = read_decoder_config(Path("config.json"), about, **here)
    except ValueError as error:
        raise ValueError(f"this model {advice} ({error})") from error
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(read, field.name, field.default) and (field.name, value) != ("score_size", None):
            raise ValueError(f"{field.name}={value!r:.80} {advice}")
