"""Layers and transforms of Flax NNX."""

from collections.abc import Callable
from typing import Any

from flax import nnx

import rslora_jax as rslora
from tests.zoo.linen_layers import HEADS, JOINED, PICTURE, SPLIT, TOKENS, X
from tests.zoo.model import Model, filled


def from_nnx(make: Callable[[nnx.Rngs], Any], *args: Any, **known: Any) -> Model:
    fn, params, state = rslora.from_nnx(nnx.eval_shape(lambda: make(nnx.Rngs(0))), state=True)
    state = filled(state)
    return Model(lambda params, *args: fn(params, state, *args)[0], filled(params), args, **known)


class Linears(nnx.Module):
    def __init__(self, rngs):
        self.split = nnx.LinearGeneral(12, (3, 5), rngs=rngs)
        self.join = nnx.LinearGeneral((3, 5), 8, axis=(-2, -1), rngs=rngs)
        self.turned = nnx.Einsum("btd,fd->bft", (7, 8), rngs=rngs)
        self.last = nnx.Linear(6, 9, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(self.turned(nnx.gelu(self.join(self.split(x)))))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 12, 10, 7, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attn(x, x[:, :4])


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(12, 9, rngs=rngs))
        self.gru = nnx.RNN(nnx.GRUCell(9, 7, rngs=rngs), reverse=True)

    def __call__(self, x):
        return self.gru(self.lstm(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.up = nnx.Linear(12, 16, rngs=rngs)
        self.down = nnx.Linear(16, 12, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def blocks(rngs: nnx.Rngs) -> Block:
    return nnx.vmap(Block)(rngs.split(3))


class Scanned(nnx.Module):
    remat = False

    def __init__(self, rngs):
        self.blocks = blocks(rngs)

    def __call__(self, x):
        run = nnx.remat(lambda block, x: block(x)) if self.remat else lambda block, x: block(x)
        return nnx.scan(lambda x, block: run(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class ScannedRemat(Scanned):
    remat = True


class Ensemble(nnx.Module):
    def __init__(self, rngs):
        self.blocks = blocks(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x)


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Conv(5, 8, (3, 3), strides=2, rngs=rngs)
        self.two = nnx.Conv(8, 8, (3, 1), feature_group_count=4, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 12, rngs=rngs)
        self.block = Block(rngs)

    def __call__(self, tokens):
        return self.embed.attend(nnx.remat(lambda block, x: block(x))(self.block, self.embed(tokens)))


class LowRank(nnx.Module):
    """NNX's own adapters, adapted: every one of the two factors is a weight."""

    def __init__(self, rngs):
        self.layer = nnx.LoRALinear(12, 7, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


STACKED = {"*/kernel": ((1,), (2,))}

MODELS: dict[str, Callable[[], Model]] = {
    "nnx Linear, LinearGeneral, Einsum": lambda: from_nnx(
        Linears,
        X,
        axes={"split/kernel": SPLIT, "join/kernel": JOINED, "turned/kernel": ((1,), (0,))},
    ),
    "nnx MultiHeadAttention": lambda: from_nnx(Attention, X, axes=HEADS),
    "nnx LSTMCell, GRUCell": lambda: from_nnx(Recurrent, X),
    "nnx scan": lambda: from_nnx(Scanned, X, axes=STACKED),
    "nnx scan, remat": lambda: from_nnx(ScannedRemat, X, axes=STACKED),
    "nnx vmap": lambda: from_nnx(Ensemble, X, axes=STACKED),
    "nnx Conv": lambda: from_nnx(Convolutions, PICTURE),
    "nnx Embed.attend, remat": lambda: from_nnx(Tied, TOKENS),
    "nnx LoRALinear": lambda: from_nnx(LowRank, X),
}
