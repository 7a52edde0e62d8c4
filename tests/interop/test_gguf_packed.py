"""GGUF files are held in memory in the blocks that they are in, and stand for the file's numbers to the last bit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.interop import load_model
from rslora_jax.sites import named_leaves
from rslora_jax.stored import dense, is_stored
from rslora_jax.stored.gguf import KINDS
from tests.devices import run_on
from tests.interop.packed_gguf import LAYERS, VOCAB, expected, write

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
AT_NIGHT = pytest.mark.nightly


def mixed(name):
    """As llama.cpp makes a Q4_K_M: some layers, and the table, in more bits."""
    more = ("blk.0.attn_v", "blk.2.attn_v", "blk.1.ffn_down", "token_embd")
    return "Q6_K" if name.startswith(more) else "Q4_K"


FILES = {kind: (lambda name, kind=kind: kind) for kind in KINDS} | {"Q4_K_M": mixed}
BY_DAY = ("Q4_K_M",)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=AT_NIGHT)])
@pytest.mark.parametrize("name", [name if name in BY_DAY else pytest.param(name, marks=AT_NIGHT) for name in FILES])
def test_every_matrix_is_held_in_its_blocks_and_is_the_files_to_the_last_bit(tmp_path, name, scan):
    found = write(tmp_path / "a.gguf", FILES[name], tied=scan)
    told = []
    model = load_model(tmp_path / "a.gguf", scan_layers=scan, progress=lambda *of: told.append(of))
    leaves = named_leaves(model.variables)
    for path, leaf in leaves.items():
        assert is_stored(leaf) == (not path.endswith("scale")), path
        if is_stored(leaf):
            np.testing.assert_array_equal(np.asarray(leaf.dense()), expected(found, path, scan), path)
    plain = load_model(tmp_path / "a.gguf", scan_layers=scan, dequantize=True)
    jax.tree.map(np.testing.assert_array_equal, named_leaves(plain.variables), {p: dense(w) for p, w in leaves.items()})
    held = sum(array.nbytes for array in jax.tree.leaves(model.variables))
    assert told[-1] == (held, held) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert held < 0.4 * sum(array.nbytes for array in jax.tree.leaves(plain.variables))
    tokens = jnp.arange(12).reshape(2, 6) % VOCAB
    got, want = (jax.jit(one.apply)(one.variables, tokens) for one in (model, plain))
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.nightly
def test_adapters_over_the_blocks_learn_what_they_learn_over_the_numbers(tmp_path):
    write(tmp_path / "a.gguf", mixed)
    tokens, found = jnp.arange(12).reshape(2, 6) % VOCAB, []
    for dequantize in (False, True):
        model = load_model(tmp_path / "a.gguf", dequantize=dequantize)
        lora = rslora.wrap(model.apply, model.variables, tokens, config=rslora.LoraConfig(rank=3, alpha=7))
        adapters = jax.tree.map(lambda leaf: leaf + 0.01, lora.init(jax.random.key(0)))
        loss = jax.value_and_grad(lambda a, m=model, lo=lora: jnp.sum(jnp.sin(lo.apply(m.variables, a, tokens))))
        found.append(jax.jit(loss)(adapters))
    for got, want in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=AT_NIGHT)])
def test_blocks_are_the_numbers_rounded_to_the_dtype_asked_for(tmp_path, dtype):
    write(tmp_path / "a.gguf", mixed)
    packed, plain = (load_model(tmp_path / "a.gguf", param_dtype=dtype, dequantize=yes) for yes in (False, True))
    for path, leaf in named_leaves(packed.variables).items():
        other = named_leaves(plain.variables)[path]
        assert leaf.dtype == other.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(dense(leaf)), np.asarray(other), path)


def test_what_has_no_blocks_is_an_array_and_what_could_have_is_said(tmp_path):
    def some(name):
        kinds = {"blk.1.attn_q": "F16", "token_embd": "F16"}
        return next((kind for start, kind in kinds.items() if name.startswith(start)), "Q8_0")

    found = write(tmp_path / "a.gguf", some)
    with pytest.warns(UserWarning, match=r"a.gguf: tensor blk.0.attn_q.weight and 1 more tensors are held as arrays"):
        leaves = named_leaves(load_model(tmp_path / "a.gguf").variables)
    arrays = {path for path, leaf in leaves.items() if not is_stored(leaf) and not path.endswith("scale")}
    assert arrays == {"params/embed/embedding", "params/layers/attn/q_proj/kernel"}
    path = "params/layers/attn/q_proj/kernel"
    np.testing.assert_array_equal(leaves[path], expected(found, path, True))

    write(tmp_path / "b.gguf", lambda name: "Q5_K" if "ffn_up" in name else "F16" if "attn" in name else "Q4_0")
    with pytest.warns(UserWarning, match=r"b.gguf: tensor blk.0.ffn_up.weight and 2 more tensors are held"):
        leaves = named_leaves(load_model(tmp_path / "b.gguf").variables)
    assert is_stored(leaves["params/layers/mlp/down_proj/kernel"])
    assert not is_stored(leaves["params/layers/mlp/up_proj/kernel"])

    write(tmp_path / "c.gguf", lambda name: "F32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        leaves = named_leaves(load_model(tmp_path / "c.gguf").variables)
    assert not any(map(is_stored, leaves.values()))


@pytest.mark.parametrize("kind", ["Q4_1", pytest.param("Q6_K", marks=AT_NIGHT)])
def test_blocks_that_are_not_finite_are_named(tmp_path, kind):
    write(tmp_path / "a.gguf", lambda name: kind, broken=["blk.1.ffn_up.weight"])
    with pytest.warns(UserWarning, match=r"a.gguf: tensor blk.1.ffn_up.weight holds numbers that are not finite"):
        load_model(tmp_path / "a.gguf")


@pytest.mark.nightly
def test_each_device_of_a_mesh_holds_its_part_of_the_blocks(tmp_path):
    write(tmp_path / "a.gguf", mixed)
    found = run_on(4, "tests.interop.packed_mesh", str(tmp_path / "a.gguf"))
    assert "all as on one device" in found


def test_the_real_model_takes_less_than_a_hundred_megabytes(smollm2_path, smollm2_scanned):
    leaves = named_leaves(load_model(smollm2_path).variables)
    assert {leaf.format for leaf in leaves.values() if is_stored(leaf)} == {"Q4_1", "Q8_0"}
    assert sum(array.nbytes for array in jax.tree.leaves(leaves)) < 100e6
    plain = named_leaves(smollm2_scanned.variables)
    for path in ("params/layers/attn/q_proj/kernel", "params/layers/mlp/down_proj/kernel", "params/embed/embedding"):
        part = leaves[path] if "embed" in path else jax.tree.map(lambda array: array[LAYERS], leaves[path])
        np.testing.assert_array_equal(part.dense(), plain[path] if "embed" in path else plain[path][LAYERS])
