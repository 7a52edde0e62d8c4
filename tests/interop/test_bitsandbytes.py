"""Folders whose weights bitsandbytes wrote in 4 and 8 bits are held as they are, to the last bit."""

import json
import warnings

import jax
import numpy as np
import pytest

from rslora_jax.interop import load_model
from rslora_jax.sites import named_leaves
from rslora_jax.stored import dense, is_stored
from tests.interop import bits, folders

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

# Of 16 numbers a row is no whole number of the usual blocks, and of 64 it is.
WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 2}


def four(kind, **how):
    return lambda rng, name, shape: bits.four_bits(rng, name, shape, kind, **how)


FORMS = {
    "nf4": (four("nf4"), WIDE),
    "nf4 single": (four("nf4", nested=False), WIDE),
    "fp4": (four("fp4"), WIDE),
    "across rows": (four("nf4"), {}),
    "blocks of 32": (four("nf4", block=32), WIDE),
    "blocks of 4096": (four("nf4", block=4096), WIDE),
    "odd": (four("fp4", nested=False), {"hidden_size": 15, "intermediate_size": 21}),
    "int8": (bits.eight_bits, WIDE),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_matrices_are_held_packed_and_are_the_files_to_the_last_bit(tmp_path, form, scan):
    make, config = FORMS[form]
    wanted = bits.numbers(bits.write(tmp_path, make, config))
    packed = named_leaves(load_model(tmp_path, scan_layers=scan).variables)
    plain = named_leaves(load_model(tmp_path, scan_layers=scan, dequantize=True).variables)
    layers = (config or folders.CONFIG).get("num_hidden_layers", folders.CONFIG["num_hidden_layers"])
    for path, leaf in packed.items():
        assert is_stored(leaf) == (path.endswith("kernel") and "layers" in path), path
        np.testing.assert_array_equal(np.asarray(dense(leaf)), np.asarray(plain[path]), path)
    for layer in range(layers):
        for name, own in (("attn/k_proj", "self_attn.k_proj"), ("mlp/down_proj", "mlp.down_proj")):
            kernel = plain[f"params/layers{'' if scan else f'_{layer}'}/{name}/kernel"]
            want = wanted[f"model.layers.{layer}.{own}.weight"].T
            np.testing.assert_array_equal(kernel[layer] if scan else kernel, want)
    name = {"fp4": "FP4", "odd": "FP4", "int8": "Int8"}.get(form, "NF4")
    name += f" in blocks of {form.split()[-1]}" if "blocks" in form else ""
    assert {leaf.format for leaf in packed.values() if is_stored(leaf)} == {name}


def test_a_layer_that_was_skipped_makes_its_stack_arrays_which_is_said(tmp_path):
    def some(rng, name, shape):
        skipped = name.startswith("model.layers.1.mlp.down_proj")
        return None if skipped else bits.four_bits(rng, name, shape, "nf4")

    wanted = bits.numbers(bits.write(tmp_path, some, WIDE, llm_int8_skip_modules=["model.layers.1.mlp.down_proj"]))
    with pytest.warns(UserWarning, match=r"tensor model.layers.0.mlp.down_proj.weight is held as arrays"):
        leaves = named_leaves(load_model(tmp_path).variables)
    kernel = leaves["params/layers/mlp/down_proj/kernel"]
    assert isinstance(kernel, jax.Array) and is_stored(leaves["params/layers/mlp/up_proj/kernel"])
    for layer in range(2):
        np.testing.assert_array_equal(kernel[layer], wanted[f"model.layers.{layer}.mlp.down_proj.weight"].T)


ONE = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{ONE}.quant_state.bitsandbytes__nf4"


def told(**changes):
    """Change what the quant_state of a matrix says."""

    def change(arrays):
        text = json.dumps(json.loads(bytes(arrays[STATE])) | changes).encode()
        arrays[STATE] = np.frombuffer(text, np.uint8)

    return change


def without(name):
    return lambda arrays: arrays.pop(f"{ONE}{name}")


def other(name, array):
    return lambda arrays: arrays.update({f"{ONE}{name}": array})


DAMAGED = {
    "no absmax": (without(".absmax"), r"q_proj.weight is in 4 or 8 bits and lacks .*absmax beside it"),
    "no map": (without(".quant_map"), "lacks .*quant_map beside it"),
    "no nested": (without(".nested_absmax"), "lacks .*nested_absmax beside it"),
    "no state": (lambda arrays: arrays.pop(STATE), "as uint8, which belongs to no matrix that bitsandbytes has"),
    "short": (
        other("", np.zeros((9, 1), np.uint8)),
        r"has 9 bytes where a matrix of shape \(64, 64\) in 4 bits has 2048",
    ),
    "few blocks": (other(".absmax", np.zeros(3, np.uint8)), r"absmax is uint8\[3\] where .* uint8\[64\]"),
    "no codes": (other(".absmax", np.zeros(64, np.float32)), r"absmax is float32\[64\] where .* uint8\[64\]"),
    "other map": (other(".quant_map", np.zeros(16, np.float32)), "quant_map has other levels than bitsandbytes's own"),
    "other nested": (other(".nested_quant_map", np.zeros(256, np.float32)), "nested_quant_map has other levels"),
    "no JSON": (
        lambda arrays: arrays.update({STATE: np.frombuffer(b"{", np.uint8)}),
        "its JSON cannot be read .*quant_state",
    ),
    "no text": (lambda arrays: arrays.update({STATE: np.zeros((2, 2), np.float32)}), "is no text"),
    "three axes": (told(shape=[4, 4, 4]), r"shape=\[4, 4, 4\] .*two sizes"),
    "other shape": (told(shape=[64, 32]), "has 2048 bytes where a matrix of shape"),
    "odd blocks": (told(blocksize=63), "blocksize=63: nf4, two sizes and an even number"),
    "another kind": (told(quant_type="fp4"), "quant_type='fp4'"),
    "no offset": (told(nested_offset=None), "nested_offset=None"),
    "other nesting": (told(nested_blocksize=128), "nested_blocksize=128"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_packed_file_that_is_not_whole_is_refused_in_one_sentence(tmp_path, case):
    change, said = DAMAGED[case]
    arrays = bits.write(tmp_path, four("nf4"), WIDE)
    change(arrays)
    (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays))
    with pytest.raises(ValueError, match=said) as caught:
        load_model(tmp_path)
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 400


def test_int8_in_another_order_or_without_its_scales_is_refused(tmp_path):
    arrays = bits.write(tmp_path, bits.eight_bits, WIDE)
    for change, said in (
        ({f"{ONE}_format": np.uint8(1)}, "weight_format is 1: only 0"),
        ({ONE.removesuffix("weight") + "SCB": np.zeros(3, np.float32)}, r"SCB is float32\[3\] where .* float32\[64\]"),
        ({ONE: np.zeros((64, 64), np.uint8)}, r"is uint8\[64, 64\] and has .*SCB beside it: a matrix of int8"),
    ):
        (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays | change))
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", None])
def test_other_methods_are_refused_by_name(tmp_path, method):
    folders.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=f"config.json has .*quant_method={method!r}, and only bitsandbytes is read"):
        load_model(tmp_path)


def test_what_is_quantised_already_is_not_quantised_again(tmp_path):
    bits.write(tmp_path, four("nf4"), WIDE)
    with pytest.raises(ValueError, match="is quantised already, by bitsandbytes"):
        load_model(tmp_path, quantize="int8")


def test_magnitudes_that_are_not_finite_are_named(tmp_path):
    arrays = bits.write(tmp_path, four("nf4", nested=False), WIDE)
    arrays[f"{ONE}.absmax"] = np.full_like(arrays[f"{ONE}.absmax"], np.nan)
    (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays))
    with pytest.warns(UserWarning, match=r"q_proj.weight holds numbers that are not finite"):
        load_model(tmp_path)


@pytest.mark.parametrize("form", ["nf4 single", "int8"])
def test_magnitudes_that_the_dtype_does_not_hold_are_named(tmp_path, form):
    arrays = bits.write(tmp_path, *FORMS[form])
    name = f"{ONE}.absmax" if form != "int8" else ONE.removesuffix("weight") + "SCB"
    arrays[name][-1] = 1e5
    (tmp_path / "model.safetensors").write_bytes(folders.safetensors(arrays))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path)
    with pytest.warns(UserWarning, match=r"q_proj.weight holds numbers that are not finite, or not in float16"):
        load_model(tmp_path, param_dtype="float16")
