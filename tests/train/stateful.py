"""Models with state, by several libraries, and how each moves it alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rslora_jax as rslora

KEY = jax.random.key(7)


class Batches:
    """Batch n is the same whenever it is asked for."""

    def __init__(self, poison=()):
        self.poison = poison

    def __getitem__(self, n):
        rng = np.random.default_rng([5, n])
        x, y = rng.standard_normal((2, 8, 6)).astype(np.float32)
        return {"x": np.full_like(x, np.inf) if n in self.poison else 1 + 2 * x, "y": y}


X = Batches()[99]["x"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with state.

    Attributes:
      fn: `fn(params, state, x, **options) -> (out, state)`, what is wrapped.
      alone: the same by the model's own library.
      training, held: the options of a call in training, of a key, and of one on held-out data.
    """

    fn: Callable[..., Any]
    params: Any
    state: Any
    alone: Callable[..., Any]
    training: Callable[[Any], dict]
    held: dict
    key: Any = None

    def loss(self, options: Callable[[Any], dict]):
        def loss(run, batch, state, key=None):
            out, state = run(state, batch["x"], **options(key))
            return jnp.sum((out - batch["y"]) ** 2), jnp.float32(batch["x"].shape[0]), state

        return loss

    @property
    def train_loss(self):
        return self.loss(self.training)

    @property
    def heldout_loss(self):
        return self.loss(lambda key: self.held)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 7, rngs=rngs)
        self.norm = nnx.BatchNorm(7, momentum=0.8, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.down = nnx.Linear(7, 6, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.tanh(self.norm(self.up(x)))))


def call(model, x, train):
    model.train() if train else model.eval()
    return model(x)


def of_nnx() -> Case:
    fn, params, state = rslora.from_nnx(NnxNet(nnx.Rngs(0)), call, state=True)

    def alone(params, state, x, train):
        model = NnxNet(nnx.Rngs(1))
        for values in (params, state):
            kept = nnx.state(model)
            nnx.replace_by_pure_dict(kept, values)
            nnx.update(model, kept)
        return call(model, x, train), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    return Case(fn, params, state, alone, lambda _: {"train": True}, {"train": False})


def of_nnx_state() -> Case:
    """As users split a module themselves: the state's leaves are in boxes."""
    graph, params, state = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, state, x, train):
        model = nnx.merge(graph, params, state)
        return call(model, x, train), nnx.state(model, nnx.Not(nnx.Param))

    return Case(fn, params, state, fn, lambda _: {"train": True}, {"train": False})


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, momentum=0.8)(nn.Dense(7)(x))
        return nn.Dense(6)(nn.Dropout(0.3, deterministic=not train)(nn.tanh(x)))


def of_linen() -> Case:
    model = LinenNet()
    variables = model.init(jax.random.key(0), X, train=False)

    def fn(params, stats, x, train, rngs=None):
        return model.apply({"params": params, **stats}, x, train, mutable=["batch_stats"], rngs=rngs)

    def alone(params, stats, x, train, rngs=None):
        return model.apply({"params": params, **stats}, x, train, mutable=list(stats), rngs=rngs)

    params = variables["params"]
    stats = {"batch_stats": variables["batch_stats"]}

    def training(key):
        return {"train": key is not None, "rngs": None if key is None else {"dropout": key}}

    return Case(fn, params, stats, alone, training, {"train": False}, KEY)


@jax.tree_util.register_pytree_node_class
class OneUse:
    """As Equinox's `State`: what was updated may not be used again."""

    def __init__(self, values):
        self.values = values

    def set(self, **values):
        new, self.values = OneUse({**self.values, **values}), None
        return new

    def tree_flatten(self):
        if self.values is None:
            raise ValueError("this state was updated, and is old")
        return tuple(self.values.values()), tuple(self.values)

    @classmethod
    def tree_unflatten(cls, names, leaves):
        return cls(dict(zip(names, leaves, strict=True)))


def of_one_use() -> Case:
    rng = np.random.default_rng(3)
    params = [jnp.asarray(rng.standard_normal(shape) / 2, jnp.float32) for shape in ((6, 7), (7, 6))]

    def fn(params, state, x, train):
        hidden, values = x @ params[0], state.values
        if train:
            mean = 0.8 * values["mean"] + 0.2 * hidden.mean(0)
            count, key = values["count"] + 1, values["key"]
            kept = jax.random.bernoulli(jax.random.fold_in(key, count), 0.7, hidden.shape)
            state = state.set(mean=mean, count=count)
            hidden = jnp.where(kept, hidden - mean, 0)
        else:
            hidden = hidden - values["mean"]
        return jnp.tanh(hidden) @ params[1], state

    values = {"mean": jnp.ones(7), "count": 0, "key": jax.random.key(5)}
    return Case(fn, params, OneUse(values), fn, lambda _: {"train": True}, {"train": False})


def of_equinox() -> Case:
    eqx = pytest.importorskip("equinox")  # pip install equinox==0.13.8, in an environment of its own

    class Net(eqx.Module):
        up: Any
        norm: Any
        drop: Any
        down: Any

        def __call__(self, x, state, key):
            x, state = self.norm(self.up(x), state)
            return self.down(self.drop(jnp.tanh(x), key=key)), state

    def make():
        one, two = jax.random.split(jax.random.key(0))
        norm = eqx.nn.BatchNorm(7, "batch", momentum=0.8, mode="ema")
        return Net(eqx.nn.Linear(6, 7, key=one), norm, eqx.nn.Dropout(0.3), eqx.nn.Linear(7, 6, key=two))

    model, state = eqx.nn.make_with_state(make)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, state, x, train, key=None):
        model = eqx.nn.inference_mode(eqx.combine(params, static), not train)
        keys = None if key is None else jax.random.split(key, len(x))
        axes = (0, None, None if key is None else 0)
        return jax.vmap(model, in_axes=axes, out_axes=(0, None), axis_name="batch")(x, state, keys)

    def training(key):
        return {"train": key is not None, "key": key}

    return Case(fn, params, state, fn, training, {"train": False}, KEY)
