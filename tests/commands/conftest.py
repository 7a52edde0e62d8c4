"""A tiny model in a file, with a token for each byte and a chat template, and runs on it."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import rslora_jax as rslora
from rslora_jax.interop.load import load_model
from rslora_jax.models.decoder import Decoder
from rslora_jax.store import checkpoint
from tests.interop.conftest import HEAD_DIM, HEADS, KV_HEADS, LAYERS, MLP, WIDTH, TinyModel, exact_weight

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SUMS = [{"question": f"{n}+{n}=", "answer": f"It is.\n#### {2 * n}"} for n in range(40)]


def tiny_model() -> TinyModel:
    tokens = ["<end>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "hi"]
    rng = np.random.default_rng(0)
    shapes = {
        "attn_q": (HEADS * HEAD_DIM, WIDTH),
        "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
        "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
        "attn_output": (WIDTH, HEADS * HEAD_DIM),
        "ffn_gate": (MLP, WIDTH),
        "ffn_up": (MLP, WIDTH),
        "ffn_down": (WIDTH, MLP),
    }
    weights = {
        "token_embd.weight": exact_weight(rng, len(tokens), WIDTH),
        "output.weight": exact_weight(rng, len(tokens), WIDTH),
        "output_norm.weight": exact_weight(rng, 1, WIDTH)[0],
    }
    for i in range(LAYERS):
        weights |= {f"blk.{i}.{name}.weight": exact_weight(rng, *shape) for name, shape in shapes.items()}
        weights |= {f"blk.{i}.{name}.weight": exact_weight(rng, 1, WIDTH)[0] for name in ("attn_norm", "ffn_norm")}
    figures = {
        "vocab_size": len(tokens),
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 0.125,
        "context_length": 128,
    }
    tokenizer = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * 257,
        "merges": ["h i"],
        "eos_token_id": 0,
        "padding_token_id": 1,
    }
    metadata = {f"llama.{name}": value for name, value in figures.items()}
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    return TinyModel(weights, metadata | {"tokenizer.chat_template": TEMPLATE})


@dataclasses.dataclass
class Place:
    """A folder with `model.gguf`, `sums.jsonl` and the runs one, two (of other gammas) and wide (of another rank)."""

    folder: object
    base: object
    runs: dict


def save_run(folder, base, config, seed, settings):
    """Write a run of one checkpoint, whose adapters do something."""
    apply = Decoder(base.config).apply
    lora = rslora.wrap(apply, base.variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("f4"), lora.init(jax.random.key(0), base.variables)
    )
    with checkpoint.open_checkpoints(folder) as checkpoints:
        about = checkpoint.describe(config, base.variables, settings)
        checkpoint.save(checkpoints, 5, adapters, {"count": np.zeros(1)}, about)
    return lora, adapters


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model().write(folder / "model.gguf")
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SUMS))
    base = load_model(model)
    settings = {"model": str(model), "data": str(folder / "sums.jsonl"), "max_len": 48, "heldout": 32}
    configs = {
        "one": rslora.LoraConfig(rank=3, alpha=7),
        "two": rslora.LoraConfig(rank=3, alpha=5, scaling="lora"),
        "wide": rslora.LoraConfig(rank=5, alpha=7, targets="*/{q,v}_proj/kernel"),
    }
    runs = {name: save_run(folder / name, base, configs[name], n, settings) for n, name in enumerate(configs)}
    return Place(folder, base, runs)
