"""What a law is tested on, and the whole models among it, in Linen, NNX and plain JAX."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rslora_jax as rslora
from tests.zoo.model import filled


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to adapt, its parameters and arguments, what to target, and its rounding."""

    fn: Callable[..., Any]
    params: Any
    args: tuple
    targets: Any = "all-linear"
    tolerance: float = 1e-5
    sites: int | None = None  # how many weights a correct discovery finds
    fallback: str = ""  # the one use, if any, that has no low-rank form


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) / np.sqrt(shape[-2] if len(shape) > 1 else 1)


def tokens(batch: int = 2, length: int = 7, vocab: int = 50) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, vocab)


class Block(nn.Module):
    width: int = 32
    scanned: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        kind = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.LayerNorm(**kind)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn", **kind)(h, h)
        h = nn.LayerNorm(**kind)(x)
        h = nn.gelu(nn.Dense(3 * self.width, name="up", **kind)(h))
        x = x + nn.Dense(self.width, name="down", **kind)(h)
        return (x, None) if self.scanned else x


class Transformer(nn.Module):
    scanned: bool = False
    tied: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        kind = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(50, 32, name="embed", **kind)
        x = embed(tokens)
        if self.scanned:
            block = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = block(scanned=True, name="layers", **kind)(x, None)
        else:
            for n in range(2):
                x = Block(name=f"layers_{n}", **kind)(x)
        x = nn.LayerNorm(name="norm", **kind)(x)
        return embed.attend(x) if self.tied else nn.Dense(50, use_bias=False, name="head", **kind)(x)


def linen(targets: Any = "all-linear", tolerance: float = 1e-5, sites: int = 12, **kwargs: Any) -> Case:
    model = Transformer(**kwargs)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()))
    return Case(model.apply, filled(shapes), (tokens(),), targets, tolerance, sites)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 80, rngs=rngs)
        self.down = nnx.Linear(80, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.drop(self.down(nnx.relu(self.up(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(32, 50, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def nnx_transformer() -> Case:
    fn, params = rslora.from_nnx(NnxTransformer(nnx.Rngs(0)), state=False)
    return Case(fn, params, (tokens(),), sites=12, tolerance=3e-5)


def mlp() -> Case:
    def fn(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"]

    params = [{"w": normal(n, i, o), "b": normal(9, o)} for n, (i, o) in enumerate([(12, 40), (40, 24), (24, 12)])]
    return Case(fn, params, (normal(5, 6, 12),), sites=3)
