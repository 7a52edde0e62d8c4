"""A small model, adapters on it, and what a test may do to the folder they are saved in."""

from __future__ import annotations

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import rslora_jax as rslora
from rslora_jax.interop.peft import load_peft, read_config
from rslora_jax.models.decoder import Decoder, DecoderConfig

TOKENS = np.array([[3, 1, 4]], np.int32)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def llama(scan=True, tied=False):
    config = DecoderConfig(
        vocab_size=19,
        width=12,
        mlp_width=20,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        tie_head=tied,
        scan_layers=scan,
    )
    return Decoder(config)


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def wrapped(model, config):
    return rslora.wrap(model.apply, shapes_of(model), TOKENS, config=config)


def random_adapters(lora):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lora.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)


CONFIG = rslora.LoraConfig(rank=5, alpha=12, targets="*/{q,up}_proj/kernel")


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def both(folder, lora):
    read_config(folder, shapes_of(llama()))
    return load_peft(folder, lora)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
