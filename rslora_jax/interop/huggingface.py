"""Read a model's folder as Hugging Face's transformers writes it: configuration, weights, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rslora_jax.interop.model import Model, Progress, Shardings, shapes_of, shardings_of
from rslora_jax.interop.names import LLAMA, Names
from rslora_jax.interop.tensors import open_folder, read_json
from rslora_jax.interop.tokenizer_files import read_tokenizer
from rslora_jax.interop.weights import load_weights
from rslora_jax.models.attention import RopeScaling
from rslora_jax.models.decoder import DecoderConfig

# What Gemma's configurations leave out.
_GEMMA = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")

# What the families' configurations leave out, by model_type; Llama 2 and 3, TinyLlama and SmolLM2 are all "llama".
_FAMILIES: dict[str, dict[str, Any]] = {
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

# Fields that would change what is computed, and the values with which they do not; `_plain` has what families allow.
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


def load_huggingface(
    folder: str | Path,
    *,
    scan_layers: bool = False,
    remat: str | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
    shardings: Shardings = None,
    names: Names = LLAMA,
    progress: Progress | None = None,
) -> Model:
    """Load (config, variables, tokenizer) from a folder of the families Llama, Mistral, Qwen 2 and 3, and Gemma 1 to 3.

    Args:
      folder: has `config.json`, `tokenizer.json` and `model.safetensors`, or an index and its shards.
      scan_layers: stack the layers' weights: kernels are (in, out), then (layers, in, out).
      remat: as in `DecoderConfig`, like `dtype`.
      param_dtype: what the weights are rounded to.
      dtype: what is computed in.
      shardings: where the weights are to lie (`interop.model.Shardings`); each device's part is read straight onto it.
      names: the table of names.
      progress: called with the bytes that are done, and all.

    Raises:
      ValueError: the folder is no whole model, or one that would be computed wrongly here; file and field or tensor are
        named. Dropout, which transformers applies in training alone, is not looked at.
    """
    folder = Path(folder)
    config = read_config(folder, scan_layers=scan_layers, remat=remat, param_dtype=param_dtype, dtype=dtype)
    ends = _eos_ids(folder)
    tokenizer = dataclasses.replace(read_tokenizer(folder, eos_id=ends[0] if ends else None), ends=ends)
    # Gemma 3 has an added token for pictures that the text model has no row for.
    tokens = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    tokens = max(tokens, *(1 + i for i in (*tokenizer.stop_ids, tokenizer.bos_id, tokenizer.pad_id) if i is not None))
    if tokens > config.vocab_size:
        raise ValueError(
            f"{folder} has {tokens} tokens in tokenizer.json and vocab_size {config.vocab_size} in "
            "config.json: they do not belong together"
        )
    shapes = shapes_of(config)
    variables = load_weights(
        open_folder(folder),
        shapes,
        shardings_of(shardings, shapes),
        names=names,
        # A tied head is written by some all the same, and early conversions hold the rotary frequencies.
        ignored=lambda name: (config.tie_head and name == "lm_head.weight") or name.endswith(".rotary_emb.inv_freq"),
        source=str(folder),
        progress=progress,
    )
    return Model(config, variables, tokenizer)


def read_config(
    folder: str | Path,
    *,
    scan_layers: bool = False,
    remat: str | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
) -> DecoderConfig:
    """Read `config.json`. Arguments and errors as in `load_huggingface`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    found = read_json(path)
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"{path} has model_type {kind!r}: only {', '.join(_FAMILIES)} are read")
    family = _FAMILIES[kind]
    architectures = found.get("architectures") or [family["architecture"]]
    if architectures != [family["architecture"]]:
        raise ValueError(f"{path} has architectures {architectures}: only {family['architecture']} is read")
    for name, plain in _plain(kind).items():
        if (value := found.get(name)) is not None and value not in plain:
            raise ValueError(f"{path} has {name}={value!r}: only {(plain or (None,))[0]!r} is computed here")

    def get(name: str, of: Any, default: Any = None, *, optional: bool = False) -> Any:
        value: Any = found.get(name, family.get(name, default))
        if value is None and optional:
            return None
        value = float(value) if of is float and type(value) is int else value
        if type(value) is not of or (of is not bool and not value > 0):
            raise ValueError(f"{path} has {name}={value!r}: it is to be a {of.__name__}, and above 0 where a number")
        return value

    heads, layers = get("num_attention_heads", int), get("num_hidden_layers", int)
    rope_base, rope_scaling = _rope(path, found, family.get("rope_theta", 10000.0))
    window, window_layers = _window(path, found, kind, layers, get)
    width = get("hidden_size", int)
    figures: dict[str, Any] = dict(
        vocab_size=get("vocab_size", int),
        width=width,
        mlp_width=get("intermediate_size", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", int, optional=kind == "llama") or heads,
        head_dim=get("head_dim", int, optional=True) or 0,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        norm_eps=get("rms_norm_eps", float, 1e-6),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "gemma3_text"),
        window=window,
        window_layers=window_layers,
        max_len=get("max_position_embeddings", int),
        tie_head=get("tie_word_embeddings", bool, False),
    )
    if kind.startswith("gemma"):
        figures |= dict(activation="gelu_tanh", norm_offset=1.0, embed_scale=width**0.5)
    if kind in ("gemma2", "gemma3_text"):
        figures |= dict(post_norms=True, score_size=get("query_pre_attn_scalar", float))
    if kind == "gemma2":
        caps = (get(name, float, optional=True) for name in _SOFTCAPS)
        figures |= dict(zip(("score_cap", "logit_cap"), caps, strict=True))
    if kind == "gemma3_text":
        figures["window_rope_base"] = get("rope_local_base_freq", float)
    try:
        return DecoderConfig(**figures, scan_layers=scan_layers, remat=remat, param_dtype=param_dtype, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _plain(kind: str) -> dict[str, tuple[Any, ...]]:
    """Give the fields that are to have one of these values, or not to be there, in a family's configuration."""
    if not kind.startswith("gemma"):
        return _PLAIN
    gelu = ("gelu_pytorch_tanh",)
    computed = {"gemma": (), "gemma2": ("query_pre_attn_scalar", *_SOFTCAPS), "gemma3_text": ("query_pre_attn_scalar",)}
    rest = {name: values for name, values in _PLAIN.items() if name not in computed[kind]}
    return rest | {"hidden_act": gelu, "hidden_activation": gelu}


def _rope(path: Path, found: Mapping[str, Any], default: float) -> tuple[float, RopeScaling | None]:
    # transformers 5 has all in `rope_parameters`.
    about = found.get("rope_parameters") or found.get("rope_scaling") or {}
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *names}
    if not isinstance(about, dict) or not set(about) <= known:
        raise ValueError(f"{path} has rope parameters {about!r}: only {', '.join(sorted(known))} are known")
    base = about.get("rope_theta", found.get("rope_theta", default))
    kind = about.get("rope_type", about.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path} has rope_type {kind!r}: only 'default' and 'llama3' are computed here")
    if about.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{path} has partial_rotary_factor={about['partial_rotary_factor']!r}: only 1 is computed here"
        )
    numbers = {"rope_theta": base} | ({name: about.get(name) for name in names} if kind == "llama3" else {})
    for name, value in numbers.items():
        if type(value) not in (int, float) or not value > 0:
            raise ValueError(f"{path} has {name}={value!r} among its rope parameters: a number above 0 is expected")
    try:
        return float(base), RopeScaling(*(numbers[name] for name in names)) if kind == "llama3" else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _window(path: Path, found: Mapping[str, Any], kind: str, layers: int, get: Any) -> tuple[int | None, Any]:
    """Give the window, and for each layer whether it has one, from the fields that the family heeds."""
    types = found.get("layer_types")
    windowed = "sliding_attention"
    if types is not None and (
        not isinstance(types, list) or len(types) != layers or not set(types) <= {windowed, "full_attention"}
    ):
        raise ValueError(f"{path} has layer_types {types!r}: {layers} of full_attention or sliding_attention are read")
    if kind == "mistral":
        window = get("sliding_window", int, optional=True)
        if types is not None and set(types) != {"full_attention" if window is None else windowed}:
            raise ValueError(f"{path} has layer_types {types!r} with sliding_window={window!r}: they contradict")
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
        raise ValueError(f"{path} has max_window_layers={first!r}: a whole number is expected")
    has_window = tuple(n >= first for n in range(layers)) if types is None else tuple(t == windowed for t in types)
    return get("sliding_window", int, 4096), has_window


def _eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            ids = tuple(i for i in (found if isinstance(found, list) else [found]) if type(i) is int and i >= 0)
            if ids:
                return ids
    return ()
