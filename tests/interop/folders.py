"""Model folders as Hugging Face has them, written by hand: numpy and JSON, no library of theirs but the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = ["<s>", "</s>", "<pad>", "h", "i", "hi", "Ġ", "1", "2", "!", "a", "u", "s", "e", "r", ":"]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# In the place of a value, for a field that is not there.
ABSENT: Any = object()
# Changes to CONFIG.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give the tensors of a model by name, (out, in), in the order of the families' papers."""
    c, width = config, config["hidden_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj.weight": (q, width),
            "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width),
            "self_attn.o_proj.weight": (width, q),
            "mlp.gate_proj.weight": (c["intermediate_size"], width),
            "mlp.up_proj.weight": (c["intermediate_size"], width),
            "mlp.down_proj.weight": (width, c["intermediate_size"]),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        if c["model_type"] == "qwen2":
            layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
        if c["model_type"] == "qwen3":
            layer |= {f"self_attn.{n}_norm.weight": (c["head_dim"],) for n in "qk"}
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (width,)
    return found if c["tie_word_embeddings"] else found | {"lm_head.weight": (c["vocab_size"], width)}


def tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Draw a model's tensors."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes(config).items()}


def safetensors(arrays: dict[str, np.ndarray], **header: Any) -> bytes:
    """Write a safetensors file; `header` are changes to what it says of a tensor, or tensors of its own."""
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        part = np.ascontiguousarray(array).tobytes()
        places = [len(data), len(data) + len(part)]
        about[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": places}
        data += part
    for name, changes in header.items():
        about[name] = {**about.get(name, {}), **changes} if isinstance(changes, dict) else changes
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def tokenizer_json(folder: Path, *, bos: bool = True) -> None:
    """Write a small byte-level tokenizer, which puts <s> in front of a text or not."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, [("h", "i")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in VOCABULARY[:3]])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))


def write(folder: Path, config: dict[str, Any] | None = None, *, shards: int = 1, dtype: Any = np.float32) -> Path:
    """Write a whole model: configuration, tokenizer, and weights in so many files."""
    config = CONFIG | (config or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_json(folder)
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": TEMPLATE}))
    arrays = tensors(config, dtype)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(arrays))
        return folder
    names = list(arrays)
    places = {}
    for n in range(shards):
        shard = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        (folder / shard).write_bytes(safetensors({name: arrays[name] for name in names[n::shards]}))
        places |= {name: shard for name in names[n::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
