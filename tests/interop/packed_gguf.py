"""GGUF files whose matrices are blocks of any kind, of numbers drawn at random, for the tests."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 3, 4, 2, 64, 10
TOKENS = ["<end>", "<pad>", "h", "i", "hi", "Ġ", "1", "2", "!", "a"]
SHAPES = {
    "attn_q": (HEADS * HEAD_DIM, WIDTH),
    "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
    "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD_DIM),
    "ffn_gate": (MLP, WIDTH),
    "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
}
PATHS = {
    "attn_q": "attn/q_proj",
    "attn_k": "attn/k_proj",
    "attn_v": "attn/v_proj",
    "attn_output": "attn/o_proj",
    "ffn_gate": "mlp/gate_proj",
    "ffn_up": "mlp/up_proj",
    "ffn_down": "mlp/down_proj",
}
# Where a block of a kind has its float16s.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
HALVES |= {"Q5_K": [0, 2]}
_SIZES = {"Q8_0": 0.001, "Q4_K": 0.0003, "Q5_K": 0.0003, "Q6_K": 0.00003}


def blocks(rng, kind, shape):
    """Return the bytes of a matrix (out, in): (out, row_bytes)."""
    kind = GGMLQuantizationType[kind]
    if kind.name in ("F32", "F16"):
        numbers = rng.normal(0, 0.05, shape).astype("f4" if kind.name == "F32" else "f2")
        return numbers.view(np.uint8).reshape(shape[0], -1)
    block, size = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for at in HALVES[kind.name]:
        halves = (_SIZES.get(kind.name, 0.01) * rng.normal(size=data.shape[:2])).astype(np.float16)
        data[..., at : at + 2] = halves[..., None].view(np.uint8)
    return data.reshape(shape[0], -1)


def paired(rows):
    """Put coordinate i and its partner i + H/2 of each head side by side, as llama.cpp has the rows of q and k."""
    return rows.reshape(-1, 2, HEAD_DIM // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write(path, kind_of, *, tied=False, arch="llama", broken=()):
    """Write a file; return the rows of each matrix as Hugging Face has them, in float32, by name.

    `kind_of(name)` is the kind of a matrix; of those that are `broken` the first float16 is infinite.
    """
    rng, found = np.random.default_rng(0), {}
    writer = GGUFWriter(path, arch)
    figures = dict(vocab_size=VOCAB, embedding_length=WIDTH, feed_forward_length=MLP, block_count=LAYERS)
    figures |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "context_length": 64}
    figures |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    figures |= {"attention.layer_norm_rms_epsilon": 0.125}
    tokenizer = dict(model="gpt2", pre="smollm", tokens=TOKENS, token_type=[3, 3, 1, 1, 1, 1, 1, 1, 1, 4])
    tokenizer |= dict(merges=["h i"], eos_token_id=0, padding_token_id=1)
    metadata = {f"{arch}.{name}": value for name, value in figures.items()}
    for name, value in (metadata | {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}).items():
        writer.add_key_value(name, value, GGUFValueType.get_type(value))
    matrices = {"token_embd.weight": (VOCAB, WIDTH)} | ({} if tied else {"output.weight": (VOCAB, WIDTH)})
    matrices |= {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
    for name, shape in matrices.items():
        kind = kind_of(name)
        rows = blocks(rng, kind, shape)
        if name in broken:
            at = HALVES[kind][0]
            rows[0, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
        found[name] = dequantize(rows, GGMLQuantizationType[kind]).reshape(shape)
        is_paired = arch == "llama" and (".attn_q." in name or ".attn_k." in name)
        writer.add_tensor(name, paired(rows) if is_paired else rows, raw_dtype=GGMLQuantizationType[kind])
    for name in ["output_norm", *(f"blk.{n}.{norm}" for n in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, WIDTH).astype("f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def expected(found, path, scan):
    """Return the weight of a path, from the rows that `write` gave."""
    if path == "params/embed/embedding":
        return found["token_embd.weight"]
    if path == "params/lm_head/kernel":
        return found["output.weight"].T
    name = next(name for name, own in PATHS.items() if own in path)
    if not scan:
        return found[f"blk.{path.split('/')[1].removeprefix('layers_')}.{name}.weight"].T
    return np.stack([found[f"blk.{n}.{name}.weight"].T for n in range(LAYERS)])
