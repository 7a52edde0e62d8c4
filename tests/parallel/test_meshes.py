"""Training on meshes of eight devices: the losses and adapters of one device, and nothing large that moves."""

import functools
import json

import jax
import numpy as np
import pytest

from rslora_jax import LoraConfig, wrap
from rslora_jax.parallel import sharding
from tests.devices import run_on

pytestmark = pytest.mark.by_day_on("newest")

BY_DAY = ["data=2,fsdp=2,tensor=2"]
AT_NIGHT = ["data=8", "fsdp=8", "data=2,fsdp=4", "data=4,tensor=2", "tensor=4,data=2"]
MESHES = [*BY_DAY, *(pytest.param(mesh, marks=pytest.mark.nightly) for mesh in AT_NIGHT)]
OTHERS = ["pmap", "data=2,fsdp=2,tensor=2 then fsdp=4 of 4"]
RESUMED_AT_NIGHT = pytest.param("fsdp=4,tensor=2 then data=8", marks=pytest.mark.nightly)


@functools.cache
def run(*ways: str) -> dict:
    said = run_on(8, "tests.mesh_program", *ways, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    return json.loads(said.splitlines()[-1])


def result(way: str) -> dict:
    """What a way of training found; those of the day share a process."""
    by_day = ("one", *BY_DAY, *OTHERS)
    return (run(*by_day) if way in by_day else run(way))[way]


@pytest.mark.xdist_group("meshes")
@pytest.mark.parametrize("way", [*MESHES, *OTHERS, RESUMED_AT_NIGHT])
def test_many_devices_train_as_one_does(way):
    one, many = result("one"), result(way)
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=2e-6)
    if way != "pmap":
        np.testing.assert_allclose(many["heldout"][-1], one["heldout"][-1], rtol=2e-6)
    assert len(one["losses"]) == 20 and one["losses"][-1] != one["losses"][0]
    for path, want in one["adapters"].items():
        # Adam divides by the root of a gradient's square: where that is near zero, rounding is not small.
        np.testing.assert_allclose(many["adapters"][path], want, atol=1e-4)


@pytest.mark.xdist_group("meshes")
@pytest.mark.parametrize("mesh", MESHES)
def test_moments_lie_with_adapters_and_merging_keeps_shardings(mesh):
    many = result(mesh)
    assert many["moment_specs"] == many["adapter_specs"]
    assert many["merged_specs"] == many["base_specs"]


@pytest.mark.xdist_group("meshes")
def test_adapters_lie_as_their_weights():
    specs = result("data=2,fsdp=2,tensor=2")["adapter_specs"]
    path = "params/layers/{}/kernel/{}".format
    assert specs[path("attn/q_proj", "a")] == [None, "fsdp", None]
    assert specs[path("attn/q_proj", "b")] == [None, None, "tensor"]
    assert specs[path("mlp/down_proj", "a")] == [None, "tensor", None]
    assert specs[path("mlp/down_proj", "b")] == [None, None, "fsdp"]


def test_the_rank_is_split_over_the_axes_that_the_other_factor_uses():
    mesh = jax.sharding.AbstractMesh((2, 3), ("fsdp", "tensor"))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("fsdp",), "tensor"))
    w = jax.ShapeDtypeStruct((5, 8, 12), "float32", sharding=where)
    x = jax.ShapeDtypeStruct((2, 8), "float32")

    def layers(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]

    lora = wrap(layers, {"w": w}, x, config=LoraConfig(rank=6, alpha=7))

    def split(rank_split):
        return {
            factor: tuple(found.spec)
            for factor, found in sharding.adapter_shardings(lora.sites, {"w": w}, split_rank=rank_split)["w"].items()
        }

    assert split(False) == {"a": (None, "fsdp", None), "b": (None, None, "tensor")}
    assert split(True) == {"a": (None, "fsdp", "tensor"), "b": (None, "fsdp", "tensor")}
    lora = wrap(layers, {"w": w}, x, config=LoraConfig(rank=4, alpha=7))
    assert split(True) == {"a": (None, "fsdp", None), "b": (None, "fsdp", "tensor")}, "3 does not divide 4"


@pytest.mark.xdist_group("meshes")
@pytest.mark.parametrize("mesh", MESHES)
def test_no_weight_is_gathered_that_the_base_alone_would_not(mesh):
    found = result(mesh)
    smallest_weight = 64 * 32  # k_proj

    def large(sizes):
        return [size for size in sizes if size >= smallest_weight]

    assert len(large(found["gathers"])) <= len(large(found["base_gathers"]))
    assert max([0, *large(found["gathers"])]) <= max([0, *large(found["base_gathers"])])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data", "'data' is not a new name=size"),
        ("data=2,data=4", "'data=4' is not a new name=size"),
        ("data=0", "not a new name=size"),
        ("data=-1,fsdp=-1", "-1 for one axis at most"),
        ("data=3", "is of 3 devices, and JAX sees"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        sharding.make_mesh(text)


def test_rows_that_cannot_be_split_are_refused():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    with pytest.raises(ValueError, match=r"12 rows cannot be split in 8 \(data x fsdp\)"):
        sharding.batch_sharding(mesh, 12)


def test_a_rule_that_matches_nothing_is_refused():
    mesh = sharding.make_mesh("fsdp=-1")
    with pytest.raises(ValueError, match=r"kernels' matches no parameter.*up/kernel"):
        sharding.param_shardings(
            {"up": {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")}}, mesh, [("*/kernels", ("fsdp",))]
        )
