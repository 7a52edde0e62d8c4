"""The real model, loaded once for this folder, and a tiny GGUF file that tests can write as they like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize

from rslora_jax.interop.gguf import find_smollm2, load_gguf

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 4, 2, 16
TOKENS = ["<end>", "<pad>", "h", "i", "hi", "Ġ", "1", "2", "!", "a"]


@pytest.fixture(scope="package")
def smollm2_path() -> Path:
    try:
        return find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="package")
def smollm2(smollm2_path):
    return load_gguf(smollm2_path, dequantize=True)


@pytest.fixture(scope="package")
def smollm2_scanned(smollm2_path):
    return load_gguf(smollm2_path, scan_layers=True, dequantize=True)


def llama_cpp_order(weight_OxI: np.ndarray) -> np.ndarray:
    """Put coordinate i and its partner i + H/2 of each head side by side, one row after the other."""
    rows = []
    for head in range(len(weight_OxI) // HEAD_DIM):
        for i in range(HEAD_DIM // 2):
            first = head * HEAD_DIM + i
            rows += [weight_OxI[first], weight_OxI[first + HEAD_DIM // 2]]
    return np.stack(rows)


def exact_weight(rng: np.random.Generator, out: int, width: int) -> np.ndarray:
    """Draw multiples of 1/128 whose every 32 hold the largest, 127/128: Q8_0 keeps them without error."""
    whole = rng.integers(-127, 128, (out, width))
    whole[:, ::32] = 127
    return whole.astype(np.float32) / 128


@dataclasses.dataclass
class TinyModel:
    """What goes into a file: `weights` as Hugging Face has them, (out, in), under the file's names."""

    weights: dict[str, np.ndarray]
    metadata: dict[str, Any]
    arch: str = "llama"
    kind: GGMLQuantizationType = GGMLQuantizationType.F32

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.arch)
        for name, value in self.metadata.items():
            writer.add_key_value(name, value, GGUFValueType.get_type(value))
        for name, weight in self.weights.items():
            if ".attn_q." in name or ".attn_k." in name:
                weight = llama_cpp_order(weight)
            if weight.dtype == np.int8:
                writer.add_tensor(name, weight, raw_dtype=GGMLQuantizationType.I8)
            elif weight.ndim == 1 or self.kind == GGMLQuantizationType.F32:
                writer.add_tensor(name, weight)
            else:
                writer.add_tensor(name, quantize(weight, self.kind), raw_dtype=self.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def tiny() -> TinyModel:
    rng = np.random.default_rng(0)
    weights = {
        "token_embd.weight": exact_weight(rng, len(TOKENS), WIDTH),
        "output.weight": exact_weight(rng, len(TOKENS), WIDTH),
        "output_norm.weight": exact_weight(rng, 1, WIDTH)[0],
    }
    for i in range(LAYERS):
        for name, out, width in (
            ("attn_q", HEADS * HEAD_DIM, WIDTH),
            ("attn_k", KV_HEADS * HEAD_DIM, WIDTH),
            ("attn_v", KV_HEADS * HEAD_DIM, WIDTH),
            ("attn_output", WIDTH, HEADS * HEAD_DIM),
            ("ffn_gate", MLP, WIDTH),
            ("ffn_up", MLP, WIDTH),
            ("ffn_down", WIDTH, MLP),
        ):
            weights[f"blk.{i}.{name}.weight"] = exact_weight(rng, out, width)
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{i}.{name}.weight"] = exact_weight(rng, 1, WIDTH)[0]
    metadata = {
        "llama.vocab_size": len(TOKENS),
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": MLP,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 500.0,
        "llama.attention.layer_norm_rms_epsilon": 0.125,
        "llama.context_length": 77,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.merges": ["h i"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    }
    return TinyModel(weights, metadata)
