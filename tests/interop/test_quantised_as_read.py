"""A base that is quantised as it is read is what `rslora_jax.quantize` makes of it, and is never dense on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.interop import load_model, quantising
from rslora_jax.sites import named_leaves
from rslora_jax.stored import is_stored
from tests.devices import run_on
from tests.interop import folders, packed_gguf

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
AT_NIGHT = pytest.mark.nightly


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=AT_NIGHT)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=AT_NIGHT)])
@pytest.mark.parametrize("name", ["nf4", "int8", "float8"])
def test_what_is_read_is_what_quantize_makes_of_the_arrays(tmp_path, name, dtype, scan, monkeypatch):
    monkeypatch.setattr(quantising, "PART", 5000)  # so that a matrix is read in several parts of unequal size
    folders.write(tmp_path, WIDE if scan else None, shards=2)
    how = {"scan_layers": scan, "param_dtype": dtype}
    told = []
    found = load_model(tmp_path, quantize=name, progress=lambda *of: told.append(of), **how).variables
    wanted, made = rslora.quantize(load_model(tmp_path, **how).variables, name)
    assert {path for path, leaf in named_leaves(found).items() if is_stored(leaf)} == set(made.weights)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    # The mean of NF4's magnitudes is formed in another order in a stack: within a unit of its last place.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-7), found, wanted)
    held = sum(array.nbytes for array in jax.tree.leaves(found))
    assert told[-1] == (held, held)


def test_a_gguf_file_is_dequantised_tensor_by_tensor(tmp_path):
    packed_gguf.write(tmp_path / "a.gguf", lambda name: "Q8_0")
    found = named_leaves(load_model(tmp_path / "a.gguf", quantize="int8").variables)
    wanted = named_leaves(rslora.quantize(load_model(tmp_path / "a.gguf", dequantize=True).variables, "int8")[0])
    for path, leaf in found.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, wanted[path])


@pytest.mark.nightly
def test_each_device_of_a_mesh_holds_its_part(tmp_path):
    folders.write(tmp_path, {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    for name in ("nf4", "int8"):
        assert "all as on one device" in run_on(4, "tests.interop.packed_mesh", str(tmp_path), name)


def test_what_cannot_be_quantised_is_refused_in_one_sentence(tmp_path):
    folders.write(tmp_path)
    with pytest.raises(ValueError, match=r"'nf8' is not known: did you mean nf4\?"):
        load_model(tmp_path, quantize="nf8")
    with pytest.raises(ValueError, match="to be quantised to int8 and dequantised: ask for one of the two"):
        load_model(tmp_path, quantize="int8", dequantize=True)
    arrays = folders.tensors(folders.CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name][3, 3] = np.inf
    (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays))
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor {name} holds numbers that are not finite"):
        load_model(tmp_path, quantize="nf4")


def peak_while_loading(folder, name):
    """Load a model in a process that does nothing else, and print how much more memory that took at most."""

    def memory(field):
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[field].split()[0]) * 1024

    load_model(folder + "/small", quantize=name)  # what the libraries and compilers take for themselves
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    variables = load_model(folder + "/large", quantize=name).variables
    taken = memory("VmHWM") - before
    print(json.dumps({"taken": taken, "held": sum(array.nbytes for array in jax.tree.leaves(variables))}))


@pytest.mark.nightly
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells")
@pytest.mark.parametrize("name", ["nf4", "int8", "float8"])
def test_loading_takes_the_packed_model_and_less_than_two_of_its_largest_tensor(tmp_path, name):
    sizes = dict(vocab_size=512, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, head_dim=64)
    large = folders.CONFIG | sizes | {"num_key_value_heads": 16, "num_hidden_layers": 6}
    folders.write(tmp_path / "small", large | {"num_hidden_layers": 1})
    folders.write(tmp_path / "large", large)
    program = (
        f"from tests.interop.test_quantised_as_read import peak_while_loading as f; f({str(tmp_path)!r}, {name!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    dense, largest = 4 * 6 * (4 * 1024 * 1024 + 3 * 1024 * 4096), 4 * 1024 * 4096
    print(f"{name}: {found}, dense {dense}, largest tensor {largest}")
    assert found["held"] < 0.3 * dense
    assert found["taken"] < found["held"] + 1.9 * largest < 0.4 * dense
