"""Leaves that qwix has quantised are taken as they are: equal to its own numbers, without the package in the core."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.parallel import sharding
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.store.checksum import checksums
from rslora_jax.stored import dense, is_stored
from rslora_jax.stored.qwix import Qwix, taken
from tests.methods.gained import trained as moved
from tests.program_models import normal
from tests.reference import assert_near, merged_by_hand

qwix = pytest.importorskip("qwix")
pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("oldest")]
AT_NIGHT = pytest.mark.nightly

QTYPES = [
    "nf4",
    "int4",
    "int8",
    "float8_e4m3fn",
    "int2",
    "int3",
    "int5",
    "float8_e5m2",
    "mxfp8",
    "nvfp4",
    "float4_e2m1fn",
]
TILES = [
    dict(channelwise_axes=[1]),
    dict(channelwise_axes=[0]),
    dict(tiled_axes={0: 16}),
    dict(tiled_axes={0: 16, 1: 4}, calibration_method="absmax,0.9"),
    dict(channelwise_axes=[1], calibration_method="minmax"),
    dict(tiled_axes={0: 16}, channelwise_axes=[1], calibration_method="minmax"),
]


def quantised(shape, qtype, dtype="float32", **how):
    if how.get("calibration_method") == "minmax" and qtype not in ("int8", "int4"):
        pytest.skip("qwix has zero points for these two alone")
    if qtype in ("mxfp8", "nvfp4"):  # of which the size of tiles is given
        how = {"tiled_axes": {0: {"mxfp8": 32, "nvfp4": 16}[qtype]}, "channelwise_axes": [1]}
    return qwix.quantize(normal(0, *shape).astype(dtype) + 0.1, qtype, **how)


@pytest.mark.parametrize("how", TILES, ids=str)
@pytest.mark.parametrize("qtype", [q if q in ("nf4", "int4") else pytest.param(q, marks=AT_NIGHT) for q in QTYPES])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=AT_NIGHT)])
def test_dense_is_what_qwix_makes_of_it_to_the_last_bit(qtype, how, dtype):
    array = quantised((64, 8), qtype, dtype, **how)
    stored = taken(array)
    assert stored.shape == (64, 8) and stored.dtype == dtype == dense(stored).dtype
    want = qwix.dequantize(array)
    np.testing.assert_array_equal(stored.dense(), want)
    np.testing.assert_array_equal(jax.jit(dense)(stored), want)
    with jax.disable_jit():
        np.testing.assert_array_equal(stored.dense(), want)
    assert checksums({"w": array})["w"].startswith("qwix ")


def test_a_stack_is_what_all_arrays_have_apart():
    each = {"stack": [0, 2], "whole": [2], "rows": [0, 1]}
    found = {n: taken(quantised((3, 16, 8), "int8", channelwise_axes=axes)).stack for n, axes in each.items()}
    assert found == {"stack": (3,), "whole": (), "rows": (3,)}
    assert taken(quantised((2, 4, 16, 8), "int8", channelwise_axes=[0, 1, 3])).stack == (2, 4)


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(20, 32)(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
        return nn.Dense(20, name="lm_head")(
            nn.tanh(nn.Dense(64, name="up")(x)) @ self.param("down", nn.initializers.normal(1.0), (64, 32))
        )


RULES = {
    "int8": dict(weight_qtype="int8"),
    "int4 in tiles": dict(weight_qtype="int4", tile_size=8),
    "nf4 in tiles": dict(weight_qtype="nf4", tile_size=8),
}


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=AT_NIGHT)])
@pytest.mark.parametrize(
    "rule", ["nf4 in tiles", *(pytest.param(n, marks=AT_NIGHT) for n in ("int8", "int4 in tiles"))]
)
def test_a_flax_model_that_qwix_quantised_is_trained_and_merged(rule, method):
    model, ids = Model(), jnp.arange(10).reshape(2, 5)
    variables = model.init(jax.random.key(0), ids)
    small = qwix.quantize_model(model, qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", **RULES[rule])]))
    shapes = jax.eval_shape(small.init, jax.random.key(0), ids)
    base = {"params": qwix.quantize_params(variables["params"], shapes["params"])}
    kinds = {path: is_stored(leaf) for path, leaf in named_leaves(base).items()}
    assert kinds.keys() == named_leaves(variables).keys() and sum(kinds.values()) >= 5
    plain = from_paths(variables, {path: jnp.asarray(dense(leaf)) for path, leaf in named_leaves(base).items()})
    lora, other = (
        rslora.wrap(model.apply, of, ids, config=rslora.LoraConfig(rank=3, alpha=7, method=method, targets="*"))
        for of in (base, plain)
    )
    assert {p: dataclasses.replace(s, fallbacks=()) for p, s in lora.sites.items()} == {
        p: dataclasses.replace(s, fallbacks=()) for p, s in other.sites.items()
    }
    assert_near(lora.apply(base, lora.init(jax.random.key(1), base), ids), model.apply(plain, ids), 1e-5)
    adapters = moved(lora.init(jax.random.key(1), base))

    def step(params):
        return jax.value_and_grad(lambda a: jnp.sum(jnp.sin(lora.apply(params, a, ids))))(adapters)

    assert_near(jax.jit(step)(base), jax.jit(step)(plain), 1e-4, floor=1e-3)
    merged = lora.merge(base, adapters)
    assert_near(
        named_leaves(merged)["params/up/kernel"], named_leaves(other.merge(plain, adapters))["params/up/kernel"], 1e-6
    )
    if method == "lora":
        by_hand = named_leaves(merged_by_hand(lora, plain, adapters))
        for path in lora.sites:
            assert_near(named_leaves(merged)[path], by_hand[path], 1e-5)


def test_checksums_shapes_and_shardings_see_one_weight():
    array = quantised((32, 8), "int4", tiled_axes={0: 16}, channelwise_axes=[1])
    base = {"w": array}
    assert checksums(base)["w"].startswith("qwix ") and " of float32[32,8] " in checksums(base)["w"]
    other = {"w": dataclasses.replace(array, scale=2 * array.scale)}
    assert checksums(other) != checksums(base)
    where = sharding.param_shardings(
        from_paths(base, named_leaves(base)), sharding.make_mesh("fsdp=-1"), [("w", ("fsdp", None))]
    )
    laid = jax.device_put(from_paths(base, named_leaves(base)), where)
    assert isinstance(laid["w"], Qwix) and laid["w"].blocks == {"codes": (16, 1), "scale": (1, 1)}
    with pytest.raises(ValueError, match="w is stored as qwix int4 already"):
        rslora.quantize(base)


def test_a_qarray_whose_tiles_are_cut_is_refused():
    array = quantised((32, 8), "int8", channelwise_axes=[1])
    with pytest.raises(ValueError, match=r"a QArray of shape \(32, 8\) has scales or zero points of shape"):
        taken(dataclasses.replace(array, scale=jnp.ones((3, 8))))
