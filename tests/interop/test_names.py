"""A user's own table of names: which way round a file has a weight is what the table says, on every way in and out."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import rslora_jax as rslora
from rslora_jax.interop import Weight, load_peft, save_peft, write_merged
from rslora_jax.interop.names import is_looped, places
from rslora_jax.interop.shards import open_folder
from rslora_jax.interop.weights import load_weights

from .toy_family import TOY, ToyConfig

safetensors = pytest.importorskip("safetensors.numpy")
tokenizer_module = pytest.importorskip("rslora_jax.interop.tokenizer")
pytestmark = pytest.mark.by_day_on("newest")

TOKENIZER = tokenizer_module.tokenizer_from_metadata(tokenizer_module.EXAMPLE)
CONFIG = ToyConfig(vocab_size=5, width=2, hidden=2, layers=1)

LAST = ("kernel", "embedding", "w", "weight", "table")
LAYOUTS = ("alone", "looped", "stacked")


@st.composite
def tables(draw):
    """Draw weights: (last part of the path, layout, rows, columns, transposed in the file, said so in the table)."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        last, transposed = draw(st.sampled_from(LAST)), draw(st.booleans())
        plain = {"kernel": True, "embedding": False}.get(last) == transposed
        layout, size = draw(st.sampled_from(LAYOUTS)), st.integers(2, 4)
        found.append((last, layout, draw(size), draw(size), transposed, not plain or draw(st.booleans())))
    return found


def model(table, seed=0):
    """Give (parameters, table of names, {name in the file: (path, layer, transposed)}) of drawn weights."""
    rng = np.random.default_rng(seed)
    params, names, wanted = {}, {}, {}
    for n, (last, layout, rows, columns, transposed, is_said) in enumerate(table):
        shape = (2, rows, columns) if layout == "stacked" else (rows, columns)
        ours, theirs = {
            "alone": (f"m{n}/{last}", f"m{n}.weight"),
            "looped": (f"m{n}_{{i}}/{last}", f"m{n}.{{i}}.weight"),
            "stacked": (f"m{n}/{last}", f"m{n}.{{i}}.weight"),
        }[layout]
        names[ours] = Weight(theirs, transposed) if is_said else theirs
        for i in (7,) if layout == "looped" else (0,):
            params[ours.replace("{i}", str(i))] = rng.normal(size=shape).astype(np.float32)
        for i in {"alone": (None,), "looped": (7,), "stacked": (0, 1)}[layout]:
            layer = i if layout == "stacked" else None
            wanted[theirs.replace("{i}", str(i))] = (ours.replace("{i}", str(i)), layer, transposed)
    return params, names, wanted


def program(params, inputs):
    outs = {}
    for path, x in inputs.items():
        if params[path].ndim == 2:
            outs[path] = x @ params[path]
        else:
            outs[path] = jax.lax.scan(lambda carry, w, x=x: (carry, x @ w), 0, params[path])[1]
    return outs


def adapted(params):
    inputs = {path: jnp.ones((3, weight.shape[-2])) for path, weight in params.items()}
    config = rslora.LoraConfig(rank=1, alpha=3, targets="*", scaling="constant", allow_large_rank=True)
    lora = rslora.wrap(program, params, inputs, config=config)
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(lora.init, jax.random.key(0))
    return lora, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def pick(array, layer):
    return array if layer is None else array[layer]


@settings(max_examples=25, deadline=None)
@given(table=tables())
def test_the_file_has_each_weight_as_the_table_says(table, tmp_path_factory):
    out: Path = tmp_path_factory.mktemp("merged") / "out"
    params, names, wanted = model(table)
    lora, adapters = adapted(params)
    about = dict(config=CONFIG, tokenizer=TOKENIZER, family=TOY, names=names, dtype="float32")
    write_merged(out, lora, params, adapters, **about)
    found, sums = safetensors.load_file(out / "model.safetensors"), {}
    assert found.keys() == wanted.keys()
    for name, (path, layer, transposed) in wanted.items():
        a, b = (np.float64(pick(adapters[path][one], layer)) for one in "ab")
        total = (np.float64(pick(params[path], layer)) + 3 * a @ b).astype(np.float32)
        np.testing.assert_array_equal(found[name], total.T if transposed else total, err_msg=name)
        sums.setdefault(path, []).append((total, layer))
    shapes = jax.eval_shape(lambda x: x, params)
    back = load_weights(open_folder(out), shapes, jax.tree.map(lambda _: None, shapes), names=names)
    for path, parts in sums.items():
        whole = parts[0][0] if parts[0][1] is None else np.stack([part for part, _ in parts])
        np.testing.assert_array_equal(back[path], whole, err_msg=path)
    assert is_looped(names, params) == any(layout == "looped" for _, layout, *_ in table)


@settings(max_examples=15, deadline=None)
@given(table=tables())
def test_what_an_adapter_replaces_lies_as_the_table_says(table, tmp_path_factory):
    out: Path = tmp_path_factory.mktemp("peft") / "out"
    params, names, wanted = model([*table, ("kernel", "alone", 3, 4, True, True)])
    *others, _ = params
    lora, adapters = adapted(params)
    replaced = {path: params[path] for path in others}
    save_peft(out, lora, adapters, names, replaced=replaced)
    found = safetensors.load_file(out / "adapter_model.safetensors")
    for name, (path, layer, transposed) in wanted.items():
        if path in replaced:
            weight = pick(params[path], layer)
            name = "base_model.model." + name.replace(".weight", ".base_layer.weight")
            np.testing.assert_array_equal(found[name], weight.T if transposed else weight, err_msg=name)
    back = load_peft(out, lora, names)
    assert back.replaced.keys() == replaced.keys()
    for path, weight in replaced.items():
        np.testing.assert_array_equal(back.replaced[path], weight, err_msg=path)


def test_a_matrix_of_which_the_table_does_not_say_is_refused_by_its_path(tmp_path):
    params = {"deep/w": np.ones((3, 3), np.float32)}
    lora, adapters = adapted(params)
    names = {"deep/w": "deep.weight"}
    said = r"deep/w is a matrix, and the table of names does not say .*: give rslora_jax.interop.Weight\(name, transpo"
    with pytest.raises(ValueError, match=said):
        write_merged(
            tmp_path / "a", lora, params, adapters, config=CONFIG, tokenizer=TOKENIZER, family=TOY, names=names
        )
    with pytest.raises(ValueError, match=said):
        save_peft(tmp_path / "b", lora, adapters, names, replaced=params)
    safetensors.save_file({"deep.weight": params["deep/w"]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        load_weights(open_folder(tmp_path), jax.eval_shape(lambda x: x, params), {"deep/w": None}, names=names)
    save_peft(tmp_path / "c", lora, adapters, names)  # the factors alone are the same either way


@pytest.mark.parametrize("shape", [(2, 3, 4), (3,)])
def test_what_is_no_matrix_cannot_be_transposed(shape):
    place = places({"w": Weight("w.weight", transposed=True)}, {"w": shape})["w.weight"]
    with pytest.raises(ValueError, match=rf"w has {len(shape)} axes in place of 2"):
        place.to_file(np.ones(shape))
    same = places({"w": Weight("w.weight")}, {"w": shape})["w.weight"]
    assert same.to_file(np.ones(shape)).shape == shape
