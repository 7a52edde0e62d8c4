"""A family of models that the library does not know: its configuration, names and module, in one file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rslora_jax.interop import Family, Weight

from . import folders


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """`hidden` is the width within a layer."""

    vocab_size: int
    width: int
    hidden: int
    layers: int
    max_len: int = 32
    param_dtype: Any = "float32"


class Layer(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, x):
        c, init = self.config, nn.initializers.normal(0.3)
        inner = jnp.tanh((x * self.param("gain", init, (c.width,))) @ self.param("mix", init, (c.width, c.hidden)))
        return x + inner @ self.param("kernel", init, (c.hidden, c.width))


class Toy(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, tokens):
        c, init = self.config, nn.initializers.normal(0.3)
        x = jnp.take(self.param("wte", init, (c.vocab_size, c.width)), tokens, axis=0)
        for n in range(c.layers):
            x = Layer(c, name=f"h_{n}")(x)
        return x @ self.param("readout", init, (c.width, c.vocab_size))


def read_config(path: Path, about: dict[str, Any], *, scan_layers, remat, param_dtype, dtype) -> ToyConfig:
    return ToyConfig(*(about[name] for name in ("vocab", "wide", "deep", "depth")), param_dtype=param_dtype)


def write_config(config: ToyConfig, dtype: str) -> dict[str, Any]:
    figures = {"vocab": config.vocab_size, "wide": config.width, "deep": config.hidden, "depth": config.layers}
    return {"model_type": "toy", "torch_dtype": dtype, **figures}


# A matrix that is transposed in the file and has no name to tell it by, and a kernel that is not, as GPT-2's.
TOY = Family(
    model_types=("toy",),
    read_config=read_config,
    write_config=write_config,
    build=Toy,
    names={
        "params/wte": Weight("wte.weight"),
        "params/h_{i}/gain": "h.{i}.gain.weight",
        "params/h_{i}/mix": Weight("h.{i}.mix.weight", transposed=True),
        "params/h_{i}/kernel": Weight("h.{i}.proj.weight", transposed=False),
        "params/readout": Weight("readout.weight", transposed=True),
    },
)


def tensors(width: int = 6, hidden: int = 10, layers: int = 2) -> dict[str, np.ndarray]:
    """Draw a model's tensors, as the file has them."""
    rng, vocab = np.random.default_rng(1), 24
    shapes = {"wte.weight": (vocab, width), "readout.weight": (vocab, width)}
    for n in range(layers):
        own = {"gain": (width,), "mix": (hidden, width), "proj": (hidden, width)}
        shapes |= {f"h.{n}.{name}.weight": shape for name, shape in own.items()}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write a model's folder."""
    folder.mkdir(parents=True)
    vocab, width = arrays["wte.weight"].shape
    config = ToyConfig(vocab, width, len(arrays["h.0.mix.weight"]), sum(name.endswith("mix.weight") for name in arrays))
    (folder / "config.json").write_text(json.dumps(write_config(config, "float32")))
    folders.tokenizer_json(folder, bos=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "model.safetensors").write_bytes(folders.safetensors(arrays))
    return folder


def logits(arrays: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Compute a model by hand, in float64, from its tensors as the file has them."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = w["wte.weight"][tokens]
    for n in range(sum(name.endswith("mix.weight") for name in w)):
        inner = np.tanh((x * w[f"h.{n}.gain.weight"]) @ w[f"h.{n}.mix.weight"].T)
        x = x + inner @ w[f"h.{n}.proj.weight"]
    return x @ w["readout.weight"].T
