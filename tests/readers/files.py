"""Small valid files of every kind, and a writer of GGUF files that writes whatever it is told."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop import bits, folders

MODEL = {
    **folders.CONFIG,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "me/base",
    "r": 3,
    "lora_alpha": 10,
    "use_rslora": True,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"down_proj": 5},
    "alpha_pattern": {"layers.1.mlp.down_proj": 7.5},
    "bias": "none",
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
}
TEXT = "hi 12!"


def model(folder: Path, *, shards: int = 1) -> None:
    """Write a Llama of two layers with every file that may lie beside its weights."""
    folders.write(folder, MODEL, shards=shards)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    pad = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    said["added_tokens_decoder"] = {"2": pad | {"special": True}}
    said |= {"pad_token": pad, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": pad}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.6}))
    (folder / "chat_template.jinja").write_text(folders.TEMPLATE)


def model_in_few_bits(folder: Path) -> None:
    """Write that Llama with matrices as bitsandbytes has them: in 4 bits, singly and doubly quantised, and in 8."""

    def form(rng: Any, name: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        if "mlp" in name:
            return bits.eight_bits(rng, name, shape)
        return bits.four_bits(rng, name, shape, "nf4" if "layers.0" in name else "fp4", nested="q_proj" in name)

    model(folder)
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": about}))
    arrays = bits.matrices(MODEL, form)
    (folder / "model.safetensors").write_bytes(folders.safetensors(arrays))


def adapter(folder: Path) -> None:
    """Write an adapter of PEFT's for that Llama."""
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(1), {}
    for name, (out, width) in ((n, s) for n, s in folders.shapes(MODEL).items() if len(s) == 2):
        module = name.removesuffix(".weight")
        rank = {"q_proj": 3, "down_proj": 5}.get(module.rpartition(".")[2])
        if rank:
            for factor, shape in (("A", (rank, width)), ("B", (out, rank))):
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = rng.normal(size=shape).astype("f4")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "adapter_model.safetensors").write_bytes(folders.safetensors(tensors))


U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TOKENS = ["<end>", "<pad>", "h", "i", "hi", "Ġ", "1", "2", "!", "a"]


def gguf_parts() -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Give the entries, each [name, type, value], and the tensors of a GGUF file, in which all of it is well."""
    entries = [
        ["general.architecture", STRING, "llama"],
        ["llama.vocab_size", U32, len(TOKENS)],
        ["llama.embedding_length", U32, 32],
        ["llama.feed_forward_length", U32, 64],
        ["llama.block_count", U32, 1],
        ["llama.attention.head_count", U32, 2],
        ["llama.attention.head_count_kv", U32, 1],
        ["llama.attention.key_length", U32, 16],
        ["llama.rope.dimension_count", U32, 16],
        ["llama.rope.freq_base", F32, 500.0],
        ["llama.attention.layer_norm_rms_epsilon", F32, 0.125],
        ["llama.context_length", U32, 77],
        ["tokenizer.ggml.model", STRING, "gpt2"],
        ["tokenizer.ggml.pre", STRING, "smollm"],
        ["tokenizer.ggml.tokens", ARRAY, (STRING, TOKENS)],
        ["tokenizer.ggml.token_type", ARRAY, (5, [3, 3, 1, 1, 1, 1, 1, 1, 1, 4])],
        ["tokenizer.ggml.merges", ARRAY, (STRING, ["h i"])],
        ["tokenizer.ggml.eos_token_id", U32, 0],
        ["tokenizer.ggml.padding_token_id", U32, 1],
        ["tokenizer.ggml.add_bos_token", BOOL, False],
        ["tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}<end>{% endfor %}"],
    ]
    rng, tensors = np.random.default_rng(2), []
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd.weight": (len(TOKENS), 32), "output.weight": (len(TOKENS), 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in sizes.items()}
    for name, shape in shapes.items():
        if "ffn_up" in name:  # Q8_0: of every 32 numbers a float16 and 32 int8
            blocks = [struct.pack("<e", rng.normal()) + rng.integers(-127, 128, 32).astype("i1").tobytes()] * 64
            tensors.append({"name": name, "dims": [32, 64], "kind": 8, "data": b"".join(blocks)})
        else:
            data = rng.normal(size=shape).astype("<f4").tobytes()
            tensors.append({"name": name, "dims": list(reversed(shape)), "kind": 0, "data": data})
    return entries, tensors


def gguf(
    entries: list[list[Any]],
    tensors: list[dict[str, Any]],
    *,
    entry_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """Write a GGUF file; a tensor's "offset", and the counts, are what they ought to be where they are not given."""
    counts = (tensor_count, len(tensors)), (entry_count, len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, *(real if said is None else said for said, real in counts))
    for name, kind, value in entries:
        head += _text(name) + struct.pack("<I", kind) + _value(kind, value)
    data = b""
    for tensor in tensors:
        head += _text(tensor["name"]) + struct.pack(f"<I{len(tensor['dims'])}Q", len(tensor["dims"]), *tensor["dims"])
        head += struct.pack("<IQ", tensor["kind"], tensor.get("offset", len(data)))
        data += tensor["data"] + b"\0" * (-len(tensor["data"]) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def _text(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes) and kind != STRING:  # what stands there, whatever it means
        return value
    if kind == STRING:
        return _text(value)
    if kind != ARRAY:
        return struct.pack(f"<{_FORMS[kind]}", value)
    of, items = value
    return struct.pack("<IQ", of, len(items)) + b"".join(_value(of, item) for item in items)
