"""Paths: a box around an array says something of it, and is no step on the way to it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from rslora_jax.interop.peft.load import replace
from rslora_jax.parallel import sharding
from rslora_jax.sites import named_leaves, path_name
from rslora_jax.store import checkpoint
from rslora_jax.store.checksum import checksums
from tests.reference import assert_near

pytestmark = pytest.mark.usefixtures("compile_fast")

CONFIG = rslora.LoraConfig(rank=3, alpha=5.0)
BOXES = (
    lambda x: nn.Partitioned(x, names=("rows", None)),
    lambda x: nn.LogicallyPartitioned(x, names=(None, "embed")),
    lambda x: nn.Partitioned(nn.LogicallyPartitioned(x, names=("a",)), names=("b",)),
    nnx.Param,
    nnx.BatchStat,
    lambda x: nnx.Param({"inner": x, "none": None}),
)


def trees(leaves):
    names = st.sampled_from(["value", "kernel", "0", "names"])  # also what a box calls its own parts

    def nodes(inner):
        return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)

    return st.recursive(leaves, nodes, max_leaves=8)


@settings(max_examples=100, deadline=None)
@given(trees(st.tuples(st.integers(0, 99), st.none() | st.sampled_from(BOXES))))
def test_a_box_is_no_step_of_a_path(tree):
    def is_pair(node):
        return isinstance(node, tuple)

    plain = jax.tree.map(lambda pair: {"inner": pair[0]} if pair[1] is BOXES[-1] else pair[0], tree, is_leaf=is_pair)
    boxed = jax.tree.map(lambda pair: pair[1](pair[0]) if pair[1] else pair[0], tree, is_leaf=is_pair)
    found = named_leaves(boxed)
    assert found == {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}
    assert list(found.values()) == jax.tree.leaves(boxed)


class Block(nn.Module):
    init: Any

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(12, kernel_init=self.init, name="dense")(nn.tanh(x)), None


class Net(nn.Module):
    box: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        parted = nn.with_partitioning(init, (None, "model")) if self.box else init
        logical = nn.with_logical_partitioning(init, ("embed", "mlp")) if self.box else init
        x = nn.tanh(nn.Dense(12, kernel_init=parted)(x))
        options = {"metadata_params": {nn.PARTITION_NAME: "layers"}} if self.box else {}
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, **options)
        return nn.Dense(5, kernel_init=parted, name="last")(scan(logical)(x, None)[0])


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)


def trained(lora):
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda leaf: 0.2 * jax.random.normal(next(keys), leaf.shape), lora.init(jax.random.key(0)))


def test_adapters_of_boxed_and_plain_parameters_are_one(tmp_path):
    boxed, plain = (Net(box).init(jax.random.key(0), X) for box in (True, False))
    assert any(isinstance(leaf, nn.Partitioned) for leaf in jax.tree.leaves(boxed, is_leaf=nn.meta.is_axis_metadata))
    assert checksums(boxed) == checksums(plain)
    of_boxed, of_plain = (rslora.wrap(Net(True).apply, params, X, config=CONFIG) for params in (boxed, plain))
    assert dict(of_boxed.sites) == dict(of_plain.sites)
    adapters = trained(of_plain)
    with checkpoint.open_checkpoints(tmp_path) as saved:
        checkpoint.save(saved, 1, adapters, {"step": np.int32(1)}, checkpoint.describe(CONFIG, plain))
    _, loaded = checkpoint.load_adapters(tmp_path, params=boxed)
    want = of_plain.apply(plain, adapters, X)
    np.testing.assert_array_equal(of_boxed.apply(boxed, loaded, X), want)
    merged = of_boxed.merge(boxed, loaded)
    assert jax.tree.structure(merged) == jax.tree.structure(boxed)
    assert_near(Net(True).apply(merged, X), want, 1e-5)
    for path, leaf in named_leaves(of_plain.merge(plain, adapters)).items():
        np.testing.assert_array_equal(named_leaves(merged)[path], leaf)
    mesh = sharding.make_mesh("model=-1")
    rules = [("*/kernel", (None, "model")), ("*/bias", ())]
    wheres = [sharding.param_shardings(params, mesh, rules) for params in (boxed, plain)]
    assert jax.tree.structure(wheres[0]) == jax.tree.structure(boxed)
    assert named_leaves(wheres[0]) == named_leaves(wheres[1])
    lie = [
        sharding.adapter_shardings(of_plain.sites, jax.device_put(*pair))
        for pair in zip((boxed, plain), wheres, strict=True)
    ]
    assert lie[0] == lie[1]
    new = replace(boxed, {"params/last/kernel": np.ones((12, 5))})
    assert jax.tree.structure(new) == jax.tree.structure(boxed) and named_leaves(new)["params/last/kernel"].sum() == 60


def test_variables_that_are_no_parameters_are_never_sites():
    class Mixing(nnx.Module):
        def __init__(self):
            self.fixed = nnx.Variable(jnp.eye(8))
            self.seen = nnx.Cache(jnp.eye(8))
            self.own = nnx.LoRAParam(jnp.eye(8))
            self.dense = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x @ self.fixed[...] @ self.seen[...] @ self.own[...])

    graph, state = nnx.split(Mixing())
    lora = rslora.wrap(lambda state, x: nnx.merge(graph, state)(x), state, X, config=CONFIG)
    assert set(lora.sites) == {"own", "dense/kernel"}
    assert lora.left_out["seen"] == "no parameter: Cache"
    lora = rslora.wrap(lambda module, x: module(x), Mixing(), X, config=CONFIG)  # a module is a pytree too
    assert set(lora.sites) == {"own", "dense/kernel"}
    assert lora.left_out["seen"] == "no parameter: Cache"


def test_adapters_of_an_nnx_state_and_of_its_values_are_one():
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 5, rngs=nnx.Rngs(1))))
    of_state = rslora.wrap(lambda state, x: nnx.merge(graph, state)(x), state, X, config=CONFIG)
    fn, params = rslora.from_nnx(nnx.merge(graph, state))
    of_values = rslora.wrap(fn, params, X, config=CONFIG)
    assert dict(of_state.sites) == dict(of_values.sites)
    adapters = trained(of_values)
    want = of_values.apply(params, adapters, X)
    np.testing.assert_array_equal(of_state.apply(state, adapters, X), want)
    merged = of_state.merge(state, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    assert_near(nnx.merge(graph, merged)(X), want, 1e-5)
