"""Layers and transforms of Flax Linen."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo.model import Model, filled

RNG = np.random.default_rng(2)
X = RNG.standard_normal((2, 6, 12)).astype(np.float32)
PICTURE = RNG.standard_normal((1, 6, 6, 5)).astype(np.float32)
TOKENS = RNG.integers(0, 20, (2, 6)).astype(np.int32)

# Attention's kernels: (in, heads, head) for the three, (heads, head, out) for the last.
SPLIT, JOINED = ((0,), (1, 2)), ((0, 1), (2,))
HEADS = {"*/{query,key,value}/kernel": SPLIT, "*/out/kernel": JOINED}


def linen(module: nn.Module, *args: Any, **known: Any) -> Model:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return Model(module.apply, filled(shapes), args, **known)


class Cross(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10, out_features=7)(x, x[:, :4], mask=mask)


class Cached(nn.Module):
    """Attention from a cache, a mutable collection: a token at a time, in a scan over the places."""

    @nn.compact
    def __call__(self, x):
        return nn.SelfAttention(num_heads=2, qkv_features=10, decode=True)(x)


def self_attention_with_cache() -> Model:
    module = Cached()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), X))
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["cache"])

    def fn(params, x):
        def step(cache, x):
            y, new = module.apply({"params": params, "cache": cache}, x[:, None], mutable=["cache"])
            return new["cache"], y[:, 0]

        cache, ys = jax.lax.scan(step, empty, jnp.swapaxes(x, 0, 1))
        return ys, cache

    return Model(fn, filled(shapes["params"]), (X,), axes=HEADS)


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        return nn.Bidirectional(nn.RNN(self.cell(9)), nn.RNN(self.cell(7)))(x)


class Layer(nn.Module):
    """A block in the form that nn.scan wants: (carry, x) -> (carry, y)."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((3, 4), name="split")(nn.LayerNorm()(x))
        h = nn.DenseGeneral(16, axis=(-2, -1), name="join")(nn.gelu(h))
        return x + nn.Dense(12, name="down")(nn.relu(h)), h.sum()


def stack(layer: Any, axis: int = 0) -> nn.Module:
    kind = nn.scan(layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
    return kind()


STACKED = {"*/split/kernel": ((1,), (2, 3)), "*/join/kernel": ((1, 2), (3,)), "*/down/kernel": ((1,), (2,))}
STACKED_LAST = {"*/split/kernel": ((0,), (2, 3)), "*/join/kernel": ((0, 2), (3,)), "*/down/kernel": ((0,), (2,))}


class Shared(nn.Module):
    """One layer three times, by a scan that broadcasts its parameters."""

    @nn.compact
    def __call__(self, x):
        kind = nn.scan(nn.remat(Layer), variable_broadcast="params", split_rngs={"params": False}, length=3)
        return kind()(x, None)


class Mapped(nn.Module):
    """A dense layer for each member of an ensemble, by nn.vmap.

    On the same data this is one product, whose result has an axis for the member.
    """

    @nn.compact
    def __call__(self, x):
        kind = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return kind(7)(x)


class Contractions(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Einsum((12, 3, 5), "...d,dhk->...hk", name="split")(x)
        return nn.Einsum((7, 3, 5), "bthk,fhk->bft", use_bias=False, name="turned")(y)


class General(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((3, 5), axis=-1, name="split")(x)
        y = nn.DenseGeneral(7, axis=(1, -1), name="far")(y)  # over places and over the head
        return nn.DenseGeneral(4, axis=-1, batch_dims=(0,), name="own")(y)  # a kernel for each row of the batch


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        y = nn.relu(nn.Conv(8, (3, 1), feature_group_count=4, kernel_dilation=2, padding="SAME")(y))
        y = nn.relu(nn.Conv(6, (1, 1), use_bias=False)(y))
        return nn.ConvTranspose(5, (2, 2), strides=(2, 2))(y)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(20, 12)
        return embed.attend(nn.Dense(12)(embed(tokens)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(7))(x)


class Experts(nn.Module):
    """Tokens sorted by expert, each run through its expert's matrix."""

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.lecun_normal(), (3, 12, 7))
        return jax.lax.ragged_dot(x.reshape(-1, 12), w, jnp.asarray([5, 0, 7]))


MODELS: dict[str, Callable[[], Model]] = {
    "linen MultiHeadDotProductAttention": lambda: linen(Cross(), X, np.ones((2, 1, 6, 4), bool), axes=HEADS),
    "linen SelfAttention, cached": self_attention_with_cache,
    "linen LSTMCell": lambda: linen(Recurrent(nn.LSTMCell), X),
    "linen OptimizedLSTMCell": lambda: linen(Recurrent(nn.OptimizedLSTMCell), X),
    "linen GRUCell": lambda: linen(Recurrent(nn.GRUCell), X),
    "linen scan": lambda: linen(stack(Layer), X, None, axes=STACKED),
    "linen scan, remat": lambda: linen(stack(nn.remat(Layer)), X, None, axes=STACKED),
    "linen scan, stacked along axis 1": lambda: linen(stack(Layer, 1), X, None, axes=STACKED_LAST),
    "linen scan, shared, remat": lambda: linen(
        Shared(), X, axes={"*/split/kernel": ((0,), (1, 2)), "*/join/kernel": ((0, 1), (2,))}
    ),
    "linen vmap": lambda: linen(Mapped(), X, axes={"*/kernel": ((1,), (0, 2))}),
    "linen Einsum": lambda: linen(Contractions(), X, axes={"*/split/kernel": SPLIT, "*/turned/kernel": ((1, 2), (0,))}),
    "linen DenseGeneral": lambda: linen(
        General(),
        X,
        axes={"*/split/kernel": SPLIT, "*/far/kernel": JOINED, "*/own/kernel": ((1,), (2,))},
    ),
    "linen Conv": lambda: linen(Convolutions(), PICTURE),
    "linen Embed.attend": lambda: linen(Tied(), TOKENS),
    "linen WeightNorm": lambda: linen(Normed(), X),
    "linen ragged_dot": lambda: linen(Experts(), X, axes={"*/kernel": ((1,), (2,))}),
}
