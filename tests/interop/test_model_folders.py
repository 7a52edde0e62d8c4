"""Hugging Face folders written by hand: what is read of them, where it comes to lie, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.interop import weights
from rslora_jax.interop.huggingface import load_huggingface
from rslora_jax.interop.load import load_model
from rslora_jax.models.decoder import Decoder

from . import folders
from .folders import FAMILIES

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

PATHS = {
    "input_layernorm.weight": ("attn_norm", "scale"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    **{f"self_attn.{n}_proj.weight": ("attn", f"{n}_proj", "kernel") for n in "qkvo"},
    **{f"self_attn.{n}_proj.bias": ("attn", f"{n}_proj", "bias") for n in "qkv"},
    **{f"self_attn.{n}_norm.weight": ("attn", f"{n}_norm", "scale") for n in "qk"},
    **{f"mlp.{n}_proj.weight": ("mlp", f"{n}_proj", "kernel") for n in ("gate", "up", "down")},
}


def weight(variables, name, scan_layers):
    """Find a tensor by its name among a model's variables, and give it as Hugging Face has it."""
    params = variables["params"]
    whole = {"model.embed_tokens.weight": ("embed", "embedding"), "model.norm.weight": ("norm", "scale")}
    if name in whole or name == "lm_head.weight":
        place = whole.get(name, ("lm_head", "kernel"))
        found = params[place[0]][place[1]]
    else:
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        place = PATHS[rest]
        found = params["layers" if scan_layers else f"layers_{layer}"]
        for key in place:
            found = found[key]
        found = found[int(layer)] if scan_layers else found
    return np.asarray(found).T if place[-1] == "kernel" else np.asarray(found)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_comes_to_its_place(tmp_path, monkeypatch, family, scan_layers):
    # So that tensors come in several pieces, the last one shorter, and the larger are written on the device.
    monkeypatch.setattr(weights, "CHUNK", 300)
    config = folders.CONFIG | FAMILIES[family]
    folders.write(tmp_path, config, shards=3 if scan_layers else 1)
    done = []
    model = load_model(tmp_path, scan_layers=scan_layers, progress=lambda *args: done.append(args))
    arrays = folders.tensors(config)
    for name, want in arrays.items():
        np.testing.assert_array_equal(weight(model.variables, name, scan_layers), want, err_msg=name)
    assert count(model.variables) == sum(array.size for array in arrays.values())
    assert done[-1] == (4 * count(model.variables),) * 2
    like = jax.eval_shape(Decoder(model.config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), like
    )
    assert bool(jnp.isfinite(Decoder(model.config).apply(model.variables, jnp.array([[4, 5, 6]]))).all())


@pytest.mark.parametrize("stored", ["float64", "float16", "bfloat16"])
def test_numbers_are_rounded_once_to_the_dtype_that_is_asked_for(tmp_path, stored):
    folders.write(tmp_path, dtype=jnp.dtype(stored))
    arrays = folders.tensors(folders.CONFIG, jnp.dtype(stored))
    for dtype in ("float32", "bfloat16"):
        variables = load_huggingface(tmp_path, param_dtype=dtype).variables
        for name, array in arrays.items():
            want = array.astype(np.float32).astype(jnp.dtype(dtype))
            np.testing.assert_array_equal(weight(variables, name, False), want, err_msg=name)


def test_a_tied_head_and_rotary_frequencies_that_are_written_all_the_same_are_left_out(tmp_path):
    config = folders.CONFIG | {"tie_word_embeddings": True}
    folders.write(tmp_path, config)
    arrays = folders.tensors(config)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays))
    assert "lm_head" not in load_huggingface(tmp_path).variables["params"]


def changed(change):
    """Write model.safetensors again, with its arrays or what its header says of them changed."""

    def run(folder):
        arrays = folders.tensors(folders.CONFIG)
        header = change(arrays) or {}
        (folder / "model.safetensors").write_bytes(folders.safetensors(arrays, **header))

    return run


def cut(size):
    def run(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return run


def begun(head):
    def run(folder):
        path = folder / "model.safetensors"
        path.write_bytes(head + path.read_bytes()[len(head) :])

    return run


def indexed(change):
    def run(folder):
        (folder / "model.safetensors").unlink()
        folders.write(folder, shards=2)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index["weight_map"], folder) or index))

    return run


def file(name, text):
    return lambda folder: (folder / name).write_text(text)


UP, NORM, HEAD = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
SECOND = "model-00002-of-00002.safetensors"
BROKEN = {
    "missing": (changed(lambda a: a.__delitem__(UP)), f"lacks tensor {UP}: it is not whole"),
    "unexpected": (
        changed(lambda a: a.update({"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)})),
        "model.safetensors holds tensor model.layers.0.self_attn.o_proj.bias, .* no place",
    ),
    "extra layer": (
        changed(lambda a: a.update({"model.layers.3.input_layernorm.weight": np.ones(16, np.float32)})),
        "holds tensor model.layers.3.input_layernorm.weight",
    ),
    "shape": (
        changed(lambda a: a.update({UP: a[UP].T})),
        rf"model.safetensors: tensor {UP} has shape \(16, 40\) where its configuration asks for \(40, 16\)",
    ),
    "rows": (changed(lambda a: a.update({HEAD: a[HEAD][1:]})), rf"{HEAD} has shape \(23, 16\) where .*\(24, 16\)"),
    "int8": (changed(lambda a: a.update({UP: a[UP].astype(np.int8)})), f"tensor {UP} as I8, and only F64, F32, F16"),
    "float8": (changed(lambda a: a.update({UP: a[UP].astype("float8_e4m3fn")})), f"tensor {UP} as F8_E4M3"),
    "unknown dtype": (changed(lambda a: {UP: {"dtype": "F33"}}), f"tensor {UP} as F33"),
    "no dtype": (changed(lambda a: {UP: {"dtype": None}}), f"no dtype, shape and place of tensor {UP}"),
    "no object": (changed(lambda a: {UP: 3}), f"no dtype, shape and place of tensor {UP}"),
    "negative": (changed(lambda a: {UP: {"shape": [-40, -16]}}), f"no dtype, shape and place of tensor {UP}"),
    "bytes": (changed(lambda a: {UP: {"shape": [40, 17]}}), rf"tensor {UP} of shape \(40, 17\) has 2560 bytes"),
    "huge": (changed(lambda a: {UP: {"shape": [1 << 62, 1 << 62]}}), f"tensor {UP} of shape .* has 2560 bytes"),
    "behind the end": (
        changed(lambda a: {NORM: {"data_offsets": [1 << 40, (1 << 40) + 64]}}),
        f"cut off within tensor {NORM}, which ends at byte 10995116",
    ),
    "backwards": (changed(lambda a: {NORM: {"data_offsets": [64, 0]}}), f"tensor {NORM} of shape .* has -64 bytes"),
    "cut in data": (cut(-1), f"cut off within tensor {HEAD}, which ends at byte .*: download it again"),
    "cut in header": (cut(100), "has 100 bytes and is cut off within its header: download it again"),
    "cut to nothing": (cut(0), "has 0 bytes and is cut off within its header"),
    "cut in length": (cut(7), "has 7 bytes and is cut off within its header"),
    "long header": (begun((1 << 31).to_bytes(8, "little")), "says that its header has 2147483648 bytes"),
    "endless header": (begun(b"\xff" * 8), "says that its header has 18446744073709551615 bytes"),
    "no json": (begun((64).to_bytes(8, "little")), "model.safetensors is damaged: its JSON cannot be read"),
    "no text": (begun((4).to_bytes(8, "little") + b"\xff\xfe{}"), "is damaged: its JSON cannot be read"),
    "a list": (begun((2).to_bytes(8, "little") + b"[]"), r"is damaged: its JSON .*\(it is no object\)"),
    "deep": (
        lambda f: (f / "model.safetensors").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
        "is damaged: its JSON cannot be read",
    ),
    "twice": (
        lambda f: (f / "model.safetensors").write_bytes((15).to_bytes(8, "little") + b'{"a":1,"a":2}  '),
        r'is damaged: .*\("a" is there twice\)',
    ),
    "no shard": (indexed(lambda m, f: (f / SECOND).unlink()), f"{SECOND} is not a file: download the model again"),
    "parent": (
        indexed(lambda m, f: {"weight_map": m | {UP: "../other/a.safetensors"}}),
        "names '../other/a.safetensors'",
    ),
    "absolute": (indexed(lambda m, f: {"weight_map": m | {UP: "/etc/passwd"}}), "names '/etc/passwd', which is not a"),
    "windows": (indexed(lambda m, f: {"weight_map": m | {UP: "..\\a.safetensors"}}), "not a file beside it"),
    "null": (indexed(lambda m, f: {"weight_map": m | {UP: "a\0.safetensors"}}), "not a file beside it"),
    "folder": (indexed(lambda m, f: {"weight_map": m | {UP: ".."}}), "names '..', which is not a file beside it"),
    "wrong shard": (
        indexed(lambda m, f: {"weight_map": m | {"x": SECOND}}),
        f"{SECOND} lacks tensor x, which the index",
    ),
    "no map": (indexed(lambda m, f: {"weight_map": 3}), "has no weight_map of tensors to files"),
    "double": (
        indexed(lambda m, f: (f / SECOND).write_bytes((f / SECOND.replace("2-", "1-")).read_bytes()) and None),
        f"{SECOND} and model-00001-of-00002.safetensors both hold",
    ),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only as .bin files, which run code .*: save the model again",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has neither model.safetensors nor model.safetensors.i",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json: give the folder"),
    "bad config": (file("config.json", "{"), "config.json is damaged: its JSON cannot be read"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json: save it with transformers'"),
    "bad tokenizer": (file("tokenizer.json", "{}"), "tokenizer.json cannot be read as a tokenizer"),
    "no end": (file("tokenizer_config.json", "{}"), "names no token that ends a text: write eos_token"),
    "no such end": (
        lambda f: file("tokenizer_config.json", "{}")(f)
        and file("generation_config.json", '{"eos_token_id": [99]}')(f),
        "eos_token_id is 99, which is not among the 16 tokens",
    ),
    "many tokens": (
        file("config.json", json.dumps(folders.CONFIG | {"vocab_size": 15})),
        "has 16 tokens in tokenizer.json and vocab_size 15 in config.json",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_not_sound_is_refused(tmp_path, case):
    change, message = BROKEN[case]
    change(folders.write(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        load_huggingface(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_the_command_line_says_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    from rslora_jax.cli import main

    folders.write(tmp_path / "model")
    cut(-1)(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "hi"}\n{"text": "ai"}\n')
    where = [
        f"--{name}={tmp_path / file}" for name, file in {"model": "model", "data": "data.jsonl", "out": "out"}.items()
    ]
    assert main(["train", *where]) == 2
    assert f"rslora: error: {tmp_path}/model/model.safetensors is cut off" in capsys.readouterr().err


def on_eight_devices(folder):
    """Load onto a mesh, and print where a weight lies."""
    from rslora_jax.models.decoder import SHARDING_RULES
    from rslora_jax.parallel.sharding import make_mesh, param_shardings
    from rslora_jax.sites import named_leaves

    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    weights.CHUNK = 300
    for scan_layers in (True, False):

        def place(shapes):
            return param_shardings(shapes, mesh, SHARDING_RULES)

        variables = load_model(folder, scan_layers=scan_layers, shardings=place).variables
        plain = load_model(folder, scan_layers=scan_layers).variables
        jax.tree.map(np.testing.assert_array_equal, variables, plain)
        wanted = named_leaves(place(jax.eval_shape(lambda v: v, plain)))
        for path, leaf in named_leaves(variables).items():
            assert leaf.sharding == wanted[path], path
        # What is given as a pytree lies so too.
        again = load_model(folder, scan_layers=scan_layers, shardings=place(variables)).variables
        assert jax.tree.map(lambda leaf: leaf.sharding, again) == jax.tree.map(lambda leaf: leaf.sharding, variables)
    kernel = named_leaves(variables)["params/layers_0/attn/q_proj/kernel"]
    print(json.dumps({"spec": [*kernel.sharding.spec]}))


@pytest.mark.xdist_group("meshes")
def test_weights_are_read_straight_onto_a_mesh(tmp_path):
    folders.write(tmp_path, FAMILIES["qwen2"], shards=2)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    program = f"from tests.interop.test_model_folders import on_eight_devices as f; f({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["spec"] == ["fsdp", "tensor"]


def peak_while_loading(folder, mesh_text):
    """Load a model in a process that does nothing else, and print how much more memory that took at most."""
    from rslora_jax.models.decoder import SHARDING_RULES
    from rslora_jax.parallel.sharding import make_mesh, param_shardings

    def memory(field):
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[field].split()[0]) * 1024

    mesh = make_mesh(mesh_text) if mesh_text else None
    shardings = (lambda shapes: param_shardings(shapes, mesh, SHARDING_RULES)) if mesh else None
    weights.CHUNK, usual = 300, weights.CHUNK
    load_model(folder + "/small", shardings=shardings)  # what the libraries take for themselves
    weights.CHUNK = usual
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    variables = load_model(folder + "/large", shardings=shardings).variables
    taken = memory("VmHWM") - before
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(variables) for shard in leaf.addressable_shards)
    print(json.dumps({"taken": taken, "held": held}))


@pytest.mark.nightly
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells")
@pytest.mark.xdist_group("meshes")
@pytest.mark.parametrize("mesh", ["", "fsdp=4,tensor=2"])
def test_loading_takes_the_model_and_at_most_its_largest_tensor(tmp_path, mesh):
    sizes = dict(vocab_size=16384, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, head_dim=64)
    large = folders.CONFIG | sizes | {"num_key_value_heads": 16, "tie_word_embeddings": True}
    folders.write(tmp_path / "small")
    folders.write(tmp_path / "large", large, shards=2)
    flags = os.environ.get("XLA_FLAGS", "") + (" --xla_force_host_platform_device_count=8" if mesh else "")
    program = f"from tests.interop.test_model_folders import peak_while_loading as f; f({str(tmp_path)!r}, {mesh!r})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    largest = 4 * 16384 * 1024
    print(f"{mesh or 'one device'}: {found}, largest tensor {largest}")
    assert found["held"] > 250e6
    assert found["taken"] < found["held"] + 1.2 * largest


def test_shardings_of_another_model_are_refused(tmp_path):
    folders.write(tmp_path)
    with pytest.raises(ValueError, match="not a pytree like the model's variables"):
        load_model(tmp_path, shardings={"params": {}})
