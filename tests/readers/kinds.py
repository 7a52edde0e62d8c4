"""Each kind of file: a valid one, how this library reads it, and what it holds by a reading that is not ours."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rslora_jax.commands.prompts import read_prompts
from rslora_jax.train import read_examples
from tests.readers import files, reading, reading_data
from tests.readers.damages import (
    Damage,
    array_file,
    blind,
    companions,
    gguf_parts_changed,
    json_lines,
    json_object,
    safetensors_header,
    within_safetensors,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      name: of the kind.
      make: writes a folder in which all is well.
      targets: a glob of the files in it that are damaged.
      read: reads the folder with this library.
      check: raises an AssertionError where what was read is not what the files hold.
      damages: what is done to a file.
    """

    name: str
    make: Callable[[Path], Any]
    targets: str
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], Any]
    damages: tuple[Damage, ...]


_CONFIG_KEYS = (
    *("rope_scaling", "rope_parameters", "layer_types", "sliding_window", "max_window_layers", "use_sliding_window"),
    *("quantization_config", "head_dim", "model_type", "num_hidden_layers", "rope_theta", "rms_norm_eps"),
    *("sliding_window_pattern", "rope_local_base_freq", "attn_logit_softcapping", "eos_token_id", "architectures"),
    *("num_key_value_heads", "vocab_size", "hidden_size", "attention_bias", "query_pre_attn_scalar"),
)
_TYPES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", math.inf, math.nan)
_ADAPTER_KEYS = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "use_dora", "rank_pattern"),
    *("modules_to_save", "alpha_pattern", "target_modules", "r", "lora_alpha", "init_lora_weights", "bias"),
)
_TOKENIZER_KEYS = (
    *("pad_token", "eos_token", "bos_token", "unk_token", "chat_template", "tokenizer_class", "add_bos_token"),
    *("added_tokens_decoder", "add_eos_token", "additional_special_tokens", "model_max_length"),
)
_TOKENIZER_ODD = (
    *("LlamaTokenizer", "</s>", "<pad>", {"2": {"content": "<pad>"}}, {"²": {"content": "a"}}, {"9" * 5000: {}}),
    *({"99": {"content": "new"}}, {"2": {"content": 5}}, [{"name": "default", "template": "{{ messages }}"}]),
    *([{"name": ["a"], "template": 3}], {"content": "<new>", "lstrip": "yes"}, "<one more>"),
)


def _both(*more: Damage) -> tuple[Damage, ...]:
    return (blind, *more)


_MODEL = functools.partial(Kind, make=files.model, read=reading.read_model, check=reading.check_model)
_SHARDS = functools.partial(
    Kind, make=functools.partial(files.model, shards=2), read=reading.read_model, check=reading.check_model
)
_FEW = functools.partial(Kind, make=files.model_in_few_bits, read=reading.read_model, check=reading.check_model)
_STATE = within_safetensors("quant_state", json_object("nested_offset", "shape", "blocksize", "nested_blocksize"))
_BITS = _both(safetensors_header, _STATE, _STATE, companions, companions, companions)
_PEFT = functools.partial(Kind, make=files.adapter, read=reading.read_peft, check=reading.check_peft)
_DATA = functools.partial(Kind, read=lambda folder: read_examples(next(folder.glob("a.*"))))
_CONFIG = json_object(*_CONFIG_KEYS, values=_TYPES)

KINDS: tuple[Kind, ...] = (
    _MODEL("config.json", targets="config.json", damages=_both(_CONFIG, _CONFIG)),
    Kind(
        "config.json alone",
        reading.other_family,
        "config.json",
        reading.read_config_alone,
        reading.check_config_alone,
        (_CONFIG,),
    ),
    _MODEL("generation_config.json", targets="generation_config.json", damages=_both(json_object("eos_token_id"))),
    _MODEL("tokenizer.json", targets="tokenizer.json", damages=_both(json_object())),
    _MODEL(
        "tokenizer_config.json",
        targets="tokenizer_config.json",
        damages=_both(*[json_object(*_TOKENIZER_KEYS, values=_TOKENIZER_ODD)] * 2),
    ),
    _MODEL(
        "special_tokens_map.json",
        targets="special_tokens_map.json",
        damages=_both(json_object(*_TOKENIZER_KEYS, values=_TOKENIZER_ODD)),
    ),
    _MODEL("chat template", targets="chat_template.jinja", damages=(blind,)),
    _MODEL("safetensors", targets="model.safetensors", damages=_both(*[safetensors_header] * 3)),
    _FEW("bitsandbytes", targets="model.safetensors", damages=_BITS),
    _FEW("bitsandbytes' config.json", targets="config.json", damages=_both(_CONFIG, _CONFIG)),
    _SHARDS("index", targets="model.safetensors.index.json", damages=_both(json_object("weight_map"))),
    _SHARDS("shard", targets="model-00001-of-00002.safetensors", damages=_both(safetensors_header)),
    Kind(
        "GGUF",
        reading.make_gguf,
        "a.gguf",
        reading.read_gguf_model,
        reading.check_gguf_model,
        _both(*[gguf_parts_changed] * 4),
    ),
    _PEFT("adapter_config.json", targets="adapter_config.json", damages=_both(*[json_object(*_ADAPTER_KEYS)] * 3)),
    _PEFT("adapter weights", targets="adapter_model.safetensors", damages=_both(*[safetensors_header] * 3)),
    Kind("checkpoint", reading.make_run, "checkpoints/3/**/*", reading.read_run, reading.check_run, (blind,)),
    Kind(
        "about",
        reading.make_run,
        "checkpoints/3/about/metadata",
        reading.read_run,
        reading.check_run,
        _both(json_object()),
    ),
    Kind(
        "about, sealed",
        reading.make_run,
        "checkpoints/3/about/metadata",
        reading.read_run,
        reading.check_resealed,
        (reading.resealed,),
    ),
    _DATA(
        "JSONL",
        make=reading_data.written("a.jsonl", reading_data.JSONL),
        targets="a.jsonl",
        check=reading_data.check_jsonl,
        damages=_both(json_lines),
    ),
    _DATA(
        "Parquet",
        make=reading_data.make_parquet,
        targets="a.parquet",
        check=reading_data.check_parquet,
        damages=(blind,),
    ),
    _DATA(
        "text",
        make=reading_data.written("a.txt", reading_data.JSONL),
        targets="a.txt",
        check=reading_data.check_text,
        damages=(blind,),
    ),
    Kind(
        "prompts",
        reading_data.written(
            "p.jsonl", reading_data.JSONL.splitlines()[0] + b"\n" + b"\n".join(reading_data.JSONL.splitlines()[1:3])
        ),
        "p.jsonl",
        lambda folder: read_prompts(str(folder / "p.jsonl")),
        reading_data.check_prompts,
        _both(json_lines),
    ),
    Kind(
        "TOML",
        reading_data.written("a.toml", reading_data.TOML),
        "a.toml",
        reading_data.read_toml,
        reading_data.check_toml,
        (blind,),
    ),
    Kind(
        "metrics",
        reading_data.make_metrics,
        "metrics.jsonl",
        reading_data.read_metrics,
        reading_data.check_metrics,
        _both(json_lines),
    ),
    Kind(
        "token cache",
        reading_data.make_cache,
        "t.npz",
        reading_data.read_cache,
        reading_data.check_cache,
        _both(array_file),
    ),
)
