"""Packed weights on a mesh: no block is cut, no device holds more than its part, and what moves moves packed."""

import json

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rslora_jax import LoraConfig, wrap
from rslora_jax.parallel.sharding import adapter_shardings, param_shardings, stored_shardings
from rslora_jax.stored import int8, nf4
from tests.devices import run_on
from tests.stored.blocks import blocks
from tests.stored.packed import FORMS, packed, random_blocks

MESH = AbstractMesh((2, 4), ("fsdp", "tensor"))


def on(*spec):
    return NamedSharding(MESH, P(*spec))


def shaped(form, path, shape):
    return jax.eval_shape(lambda w: packed(form, path, w), jax.ShapeDtypeStruct(shape, "float32"))


def specs(where):
    return {
        jax.tree_util.keystr(path, simple=True): tuple(of.spec)
        for path, of in jax.tree_util.tree_leaves_with_path(where)
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("path", "axis"), [("kernel", 0), ("embedding", 1)])
def test_each_array_is_split_as_its_weight_and_no_block_is_cut(form, path, axis):
    # Along the in-axis 1,024 numbers are 4 to 32 blocks, and 768 are 3 of the larger ones.
    for size, names in [(1024, "tensor"), (1024, ("fsdp", "tensor")), (768, "tensor")]:
        shape = [3, 16, 16]
        shape[1 + axis] = size
        leaf, spec = shaped(form, path, tuple(shape)), [None, None, None]
        spec[1 + axis] = names
        found = stored_shardings(leaf, on(*spec))
        assert jax.tree.structure(found) == jax.tree.structure(leaf)
        parts = 8 if names != "tensor" else 4
        for (name, array), (_, of) in zip(named_arrays(leaf), named_arrays(found), strict=True):
            block = leaf.blocks[name][axis] if name in leaf.blocks else None
            cut = block is not None and (array.shape[1 + axis] // block) % parts == 0
            assert (tuple(of.spec)[1 + axis : 2 + axis] == (names,)) == cut, (name, size, names)


def named_arrays(tree):
    return [
        (jax.tree_util.keystr(path[:1], simple=True), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def test_specs_by_hand():
    w = jax.eval_shape(lambda w: nf4(w, 0, 1), jax.ShapeDtypeStruct((4, 256, 16), "float32"))
    found = specs(stored_shardings(w, on("fsdp", "tensor", None)))
    each = ("fsdp", "tensor", None)
    assert found == {"codes": each, "absmax": each, "nested": ("fsdp",), "offset": ("fsdp",)}
    flat = jax.eval_shape(lambda w: nf4(w, 0, 1), jax.ShapeDtypeStruct((4, 100, 16), "float32"))
    assert {of for of in specs(stored_shardings(flat, on("fsdp", "tensor", None))).values()} == {("fsdp",)}
    eight = jax.eval_shape(lambda w: int8(w), jax.ShapeDtypeStruct((16, 8), "float32"))
    assert specs(stored_shardings(eight, on("fsdp", "tensor"))) == {
        "codes": ("fsdp", "tensor"),
        "scale": (None, "tensor"),
    }
    own = jax.eval_shape(lambda w: blocks(w, 1), jax.ShapeDtypeStruct((4, 16, 8), "float32"))
    assert specs(stored_shardings(own, on("fsdp", "tensor"))) == {"codes": ("fsdp",), "scale": ("fsdp",)}
    several = jax.eval_shape(lambda: random_blocks("Q4_1", (4, 256, 8), 0))
    object.__setattr__(several, "kinds", ("Q4_1", "Q5_0"))  # rows of several lengths are whole
    assert specs(stored_shardings(several, on("fsdp", "tensor", None)))["data"] == ("fsdp", None, None)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert set(jax.tree.leaves(stored_shardings(eight, here))) == {here}
    assert stored_shardings(jax.ShapeDtypeStruct((4,), "float32"), here) is here


@pytest.mark.parametrize("form", FORMS)
def test_adapters_lie_as_the_packed_weight(form):
    def layers(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["kernel"])[1]

    params, x = {"kernel": shaped(form, "kernel", (3, 1024, 32))}, jax.ShapeDtypeStruct((2, 1024), "float32")
    lora = wrap(layers, params, x, config=LoraConfig(rank=6, alpha=7))
    where = param_shardings(params, MESH, [("kernel", ("fsdp", "tensor"))])
    params = jax.tree.map(lambda w, of: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=of), params, where)
    found = adapter_shardings(lora.sites, params)["kernel"]
    assert {name: tuple(of.spec) for name, of in found.items()} == {
        "a": (None, "fsdp", None),
        "b": (None, None, "tensor"),
    }


DAY = pytest.param("fsdp=2,tensor=2", "nf4", marks=pytest.mark.by_day_on("newest"))
NIGHT = [(mesh, form) for mesh in ("fsdp=4", "tensor=4", "fsdp=2,tensor=2", "data=2,fsdp=2") for form in FORMS]


@pytest.mark.parametrize(
    ("mesh", "form"),
    [DAY, *(pytest.param(*of, marks=pytest.mark.nightly) for of in NIGHT if of != ("fsdp=2,tensor=2", "nf4"))],
)
def test_values_and_gradients_are_those_of_one_device_and_codes_are_gathered(mesh, form):
    said = run_on(4, "tests.packed_mesh_program", mesh, form, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    found = json.loads(said.splitlines()[-1])[form]
    assert found["apart"] < 2e-4
    # In blocks of 256, the in-axes are 2 and 4 of them: four devices share the latter alone.
    parts = 1 if "_K" in form else 2 if "data" in mesh else 4
    assert found["largest part"] <= 1.05 / parts
    large = {dtype for dtype, size in found["gathers"] if size >= 128 * 64 // 8}
    assert large <= {"u8", "s8", "f8e4m3fn"} and bool(large) == ("fsdp" in mesh)
