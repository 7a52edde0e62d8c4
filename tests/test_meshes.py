"""Training on meshes of eight devices: the losses and adapters of one device, and nothing large that moves."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from rslora_jax import sharding

BY_DAY = ["data=2,fsdp=2,tensor=2"]
AT_NIGHT = ["data=8", "fsdp=8", "data=2,fsdp=4", "data=4,tensor=2", "tensor=4,data=2"]
MESHES = [*BY_DAY, *(pytest.param(mesh, marks=pytest.mark.nightly) for mesh in AT_NIGHT)]


@functools.cache
def run(mesh: str = "") -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.mesh_program", *([mesh] if mesh else [])]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xdist_group("meshes")
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_as_one_device_does(mesh):
    one, many = run(), run(mesh)
    assert many["devices"] == 8
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(many["heldout"], one["heldout"], rtol=2e-5)
    assert len(one["losses"]) == 20 and one["losses"][-1] != one["losses"][0]
    for path, want in one["adapters"].items():
        # Adam divides by the root of a gradient's square: where that is near zero, rounding is not small.
        np.testing.assert_allclose(many["adapters"][path], want, atol=2e-3)
    assert many["moment_specs"] == many["adapter_specs"]
    assert many["merged_specs"] == many["base_specs"]


@pytest.mark.xdist_group("meshes")
def test_adapters_lie_as_their_weights():
    specs = run("data=2,fsdp=2,tensor=2")["adapter_specs"]
    path = "params/layers/{}/kernel/{}".format
    assert specs[path("attn/q_proj", "a")] == [None, "fsdp", None]
    assert specs[path("attn/q_proj", "b")] == [None, None, "tensor"]
    assert specs[path("mlp/down_proj", "a")] == [None, "tensor", None]
    assert specs[path("mlp/down_proj", "b")] == [None, None, "fsdp"]


@pytest.mark.xdist_group("meshes")
@pytest.mark.parametrize("mesh", MESHES)
def test_no_weight_is_gathered_that_the_base_alone_would_not(mesh):
    found = run(mesh)
    smallest_weight = 64 * 32  # k_proj
    large = lambda sizes: [size for size in sizes if size >= smallest_weight]
    assert len(large(found["gathers"])) <= len(large(found["base_gathers"]))
    assert max([0, *large(found["gathers"])]) <= max([0, *large(found["base_gathers"])])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data", "'data' is not a new name=size"),
        ("data=2,data=4", "'data=4' is not a new name=size"),
        ("data=0", "not a new name=size"),
        ("data=-1,fsdp=-1", "-1 for one axis at most"),
        ("data=3", "is of 3 devices, and there are"),
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
