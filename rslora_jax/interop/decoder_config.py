"""The config.json of decoders, of the families of Hugging Face's transformers, as it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rslora_jax.interop.decoder_rope import read_rope
from rslora_jax.models.decoder_config import LARGEST_HEAD, LARGEST_SIZE, MOST_LAYERS, DecoderConfig
from rslora_jax.shown import quoted

# What Gemma's configurations leave out.
_GEMMA = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")

# What configurations leave out, by model_type; Llama 2 and 3, TinyLlama and SmolLM2 are all "llama".
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM", "max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"architecture": "MistralForCausalLM", "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "max_position_embeddings": 32768},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "max_position_embeddings": 32768, "head_dim": 128},
    "gemma": {"architecture": "GemmaForCausalLM", **_GEMMA},
    "gemma2": {"architecture": "Gemma2ForCausalLM", **_GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | dict(zip(_SOFTCAPS, (50.0, 30.0), strict=True)),
    "gemma3_text": {"architecture": "Gemma3ForCausalLM", **_GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
}

MODEL_TYPES = tuple(_KINDS)

# Gives a field's value, checked: get(name, kind, default, optional=False).
_Get = Callable[..., Any]

# Fields that would change what is computed, and the values with which they do not; `_plain` has what kinds allow.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "quantization_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "clip_qkv": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}


def read_decoder_config(path: Path, about: Mapping[str, Any], **how: Any) -> DecoderConfig:
    """Read a decoder's configuration.

    Args:
      path: of the config.json, for errors.
      about: its content.
      how: scan_layers, remat, param_dtype and dtype of the `DecoderConfig`.

    Raises:
      ValueError: a field is missing, is of the wrong kind or asks for what is not computed here; it is named.
    """
    kind = about["model_type"]
    known = _KINDS[kind]
    architectures = about.get("architectures") or [known["architecture"]]
    if architectures != [known["architecture"]]:
        raise ValueError(f"{path} has architectures {quoted(architectures)}: only {known['architecture']} is read")
    for name, plain in _plain(kind).items():
        if (value := about.get(name)) is not None and value not in plain:
            raise ValueError(f"{path} has {name}={quoted(value)}: only {(plain or (None,))[0]!r} is computed here")

    def get(name: str, of: Any, default: Any = None, *, optional: bool = False) -> Any:
        value: Any = about.get(name, known.get(name, default))
        if value is None and optional:
            return None
        most = {"num_hidden_layers": MOST_LAYERS, "head_dim": LARGEST_HEAD}.get(name, LARGEST_SIZE)
        if type(value) not in ((of, int) if of is float else (of,)) or (of is not bool and not 0 < value <= most):
            raise ValueError(
                f"{path} has {name}={quoted(value)}: it is to be a {of.__name__}, and above 0 where a number"
            )
        return of(value)

    figures = _sizes(kind, get) | _parts(kind, get)
    head_dim = figures["head_dim"] or figures["width"] // figures["num_heads"]
    if head_dim > LARGEST_HEAD:
        raise ValueError(
            f"{path} has num_attention_heads={figures['num_heads']}, so heads of {head_dim}: none are so large"
        )
    default = known.get("rope_theta", 10000.0)
    rope = read_rope(path, about, head_dim=head_dim, max_len=figures["max_len"], base=default)
    window, window_layers = _window(path, about, kind, get)
    figures |= dict(rope_base=rope.base, rope_scaling=rope.scaling, window=window, window_layers=window_layers)
    if rope.window_base is not None:
        figures["window_rope_base"] = rope.window_base
    if rope.scaling is not None and rope.scaling.growth is not None:  # which begins where the others end
        figures["max_len"] = int(figures["max_len"] * rope.scaling.growth)
    try:
        return DecoderConfig(**figures, **how)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sizes(kind: str, get: _Get) -> dict[str, Any]:
    heads = get("num_attention_heads", int)
    return dict(
        vocab_size=get("vocab_size", int),
        width=get("hidden_size", int),
        mlp_width=get("intermediate_size", int),
        num_layers=get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", int, optional=kind == "llama") or heads,
        head_dim=get("head_dim", int, optional=True) or 0,
        norm_eps=get("rms_norm_eps", float, 1e-6),
        max_len=get("max_position_embeddings", int),
        tie_head=get("tie_word_embeddings", bool, False),
    )


def _parts(kind: str, get: _Get) -> dict[str, Any]:
    """Give what a kind adds to Llama 2."""
    parts: dict[str, Any] = dict(qkv_bias=kind == "qwen2", qk_norm=kind in ("qwen3", "gemma3_text"))
    if kind.startswith("gemma"):
        parts |= dict(activation="gelu_tanh", norm_offset=1.0, embed_scale=get("hidden_size", int) ** 0.5)
    if kind in ("gemma2", "gemma3_text"):
        parts |= dict(post_norms=True, score_size=get("query_pre_attn_scalar", float))
    if kind == "gemma2":
        caps = (get(name, float, optional=True) for name in _SOFTCAPS)
        parts |= dict(zip(("score_cap", "logit_cap"), caps, strict=True))
    if kind == "gemma3_text":
        parts["window_rope_base"] = get("rope_local_base_freq", float)
    return parts


def _plain(kind: str) -> dict[str, tuple[Any, ...]]:
    """Give the fields that are to have one of these values, or not to be there, in a configuration of a kind."""
    if not kind.startswith("gemma"):
        return _PLAIN
    gelu = ("gelu_pytorch_tanh",)
    computed = {"gemma": (), "gemma2": ("query_pre_attn_scalar", *_SOFTCAPS), "gemma3_text": ("query_pre_attn_scalar",)}
    rest = {name: values for name, values in _PLAIN.items() if name not in computed[kind]}
    return rest | {"hidden_act": gelu, "hidden_activation": gelu}


def _window(path: Path, found: Mapping[str, Any], kind: str, get: _Get) -> tuple[int | None, Any]:
    """Give the window, and for each layer whether it has one, from the fields that the kind heeds."""
    types, layers = found.get("layer_types"), get("num_hidden_layers", int)
    windowed = "sliding_attention"
    if types is not None and (
        not isinstance(types, list)
        or len(types) != layers
        or not all(one in (windowed, "full_attention") for one in types)
    ):
        raise ValueError(
            f"{path} has layer_types {quoted(types)}: {layers} of full_attention or sliding_attention are read"
        )
    if kind == "mistral":
        window = get("sliding_window", int, optional=True)
        if types is not None and set(types) != {"full_attention" if window is None else windowed}:
            raise ValueError(f"{path} has layer_types {quoted(types)} with sliding_window={window!r}: they contradict")
        return window, None
    if kind in ("gemma2", "gemma3_text"):
        # Every so many layers one sees all; Gemma 2's files say nothing of it.
        every = get("sliding_window_pattern", int, 6) if kind == "gemma3_text" else 2
        has_window = tuple(bool(n % every) for n in range(1, layers + 1))
        has_window = has_window if types is None else tuple(t == windowed for t in types)
        return get("sliding_window", int), has_window
    if kind in ("llama", "gemma") or not get("use_sliding_window", bool, False):
        window = found.get("sliding_window") if kind in ("llama", "gemma") else None
        if window is not None or windowed in (types or []):
            raise ValueError(f"{path} has sliding_window or layer_types with it, and {kind!r} computes without")
        return None, None
    first = found.get("max_window_layers", 28)
    if types is None and type(first) is not int:
        raise ValueError(f"{path} has max_window_layers={quoted(first)}: a whole number is expected")
    has_window = tuple(n >= first for n in range(layers)) if types is None else tuple(t == windowed for t in types)
    return get("sliding_window", int, 4096), has_window
