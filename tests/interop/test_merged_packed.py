"""Merging over packed bases: dense folders, and folders in 4 and 8 bits that bitsandbytes reads."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.interop import load_model, merged, rounding
from rslora_jax.interop.bits_written import few_bits, kinds_of
from rslora_jax.sites import named_leaves
from rslora_jax.stored import dense, is_stored
from tests.interop import folders

from .test_merged import DTYPES, FLAX, read

pytest.importorskip("safetensors")
pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

# Rows of 64 numbers are whole blocks of NF4, and rows of 16 are not.
WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 2}
SHAPES = [(1, 1), (64, 64), (1, 63), (130, 192), (256, 65)]
AT_NIGHT = pytest.mark.nightly
SCALE = 7 / math.sqrt(3)


def adapted(folder, size=0.05, **how):
    """Load a folder and give it adapters of rank 3 and alpha 7, whose B is not zero."""
    model = load_model(folder, **how)
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")
    lora = rslora.wrap(model.apply, model.variables, tokens, config=rslora.LoraConfig(rank=3, alpha=7))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lora.init, jax.random.key(0))
    return model, lora, jax.tree.map(lambda x: (size * rng.normal(size=x.shape)).astype(np.float32), shapes)


def write(folder, model, lora, adapters, **how):
    """Merge into a folder of a model that was read from another."""
    kept = {"config": model.config, "tokenizer": model.tokenizer, "family": model.family, "changed": model.changed}
    return merged.write_merged(folder, lora, model.variables, adapters, **kept, **how)


def exact(name, model, adapters):
    """Return W and gamma A B, (out, in) in float64, by what each layer's packed arrays stand for."""
    parts = name.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else None
    path = FLAX[name if layer is None else ".".join([*parts[:2], "{i}", *parts[3:]])]

    def take(x):
        return np.asarray(x if layer is None else x[layer], np.float64)

    weight = take(dense(named_leaves(model.variables)[path]))
    update = SCALE * take(adapters[path]["a"]) @ take(adapters[path]["b"]) if path in adapters else None
    turned = path.endswith("kernel")
    return weight.T if turned else weight, update.T if update is not None and turned else update


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("nf4", "float32"),
        *(pytest.param("nf4", dtype, marks=AT_NIGHT) for dtype in ("float16", "bfloat16")),
        *(pytest.param(form, dtype, marks=AT_NIGHT) for form in ("int8", "float8") for dtype in DTYPES),
    ],
)
def test_a_packed_base_is_merged_dense_tensor_by_tensor_as_its_numbers_are(form, dtype, tmp_path):
    model, lora, adapters = adapted(folders.write(tmp_path / "base", WIDE), quantize=form, scan_layers=True)
    assert any(map(is_stored, named_leaves(model.variables).values()))
    roundings = write(tmp_path / "out", model, lora, adapters, dtype=dtype, base=tmp_path / "base")
    for name, tensor in read(tmp_path / "out").items():
        weight, update = exact(name, model, adapters)
        want = weight if update is None else weight + update
        assert (tensor == want.astype(DTYPES[dtype]).astype(np.float64)).all(), name
    assert len(roundings) == 7 * WIDE["num_hidden_layers"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    whole = load_model(tmp_path / "out", scan_layers=True)
    tokens = np.arange(12).reshape(2, 6)
    got, want = whole.apply(whole.variables, tokens), lora.apply(model.variables, adapters, tokens)
    tolerance = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max()))


@pytest.mark.parametrize(
    ("form", "config", "scan", "shards"),
    [
        ("nf4", WIDE, True, 1),
        ("int8", WIDE, False, 10**9),
        pytest.param("nf4", {}, True, 10**9, marks=AT_NIGHT),
        pytest.param("nf4", {}, False, 1, marks=AT_NIGHT),
        pytest.param("int8", WIDE, True, 1, marks=AT_NIGHT),
    ],
)
def test_a_model_merged_into_few_bits_is_read_again_as_what_was_said_to_be_lost(form, config, scan, shards, tmp_path):
    folders.write(tmp_path / "base", config)
    model, lora, adapters = adapted(tmp_path / "base", scan_layers=scan)
    roundings = write(tmp_path / "out", model, lora, adapters, dtype=form, rest="float32", max_shard_size=shards)
    again, adapted_again = load_model(tmp_path / "out", scan_layers=scan), set(adapters)
    lost = {True: [], False: []}
    sums = named_leaves(lora.merge(model.variables, adapters))
    for path, leaf in named_leaves(again.variables).items():
        assert is_stored(leaf) == (path in adapted_again), path
        if is_stored(leaf):
            lost[True].append(np.asarray(dense(leaf), np.float64) - np.asarray(sums[path], np.float64))
        else:
            np.testing.assert_array_equal(leaf, sums[path])
    total = rounding.together("all", roundings)
    assert total.error == pytest.approx(math.hypot(*map(np.linalg.norm, lost[True])), rel=1e-4)
    assert 0 < total.error < 0.2 * math.hypot(total.weight, total.update)
    said = rounding.meaning(total, form)
    assert f"rounding to {form} moves" in said and ("merge in bfloat16" in said) == (total.relative > 0.5)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(3, 5), *(pytest.param(shape, marks=AT_NIGHT) for shape in SHAPES)])
def test_tensors_are_of_the_sizes_that_are_said_before_they_are_made(form, shape):
    rows = np.random.default_rng(0).normal(size=shape)
    rows[0] = 0
    tensors, numbers = few_bits("a.weight", rows, form, "bfloat16")
    kinds = kinds_of("a.weight", shape, form)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (k.shape, k.dtype) for n, k in kinds.items()}
    assert numbers.shape == shape and np.abs(numbers - rows).max() < 0.3 * np.abs(rows).max() + 1e-9


def test_a_dtype_that_there_is_not_is_refused(tmp_path):
    model, lora, adapters = adapted(folders.write(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"dtype='int4' is not known: use bfloat16, float16, float32, nf4, int8"):
        write(tmp_path / "out", model, lora, adapters, dtype="int4")
