"""A family that the library does not know is one file: loaded, wrapped, merged, exported, imported over its record."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.cli import main
from rslora_jax.interop import families, load_model, load_peft, read_config, save_peft, write_merged
from rslora_jax.store import checkpoint

from . import toy_family
from .runs import make_run
from .toy_family import TOY

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

TOKENS = np.array([[5, 1, 23], [7, 7, 0]])
SHAPES = {"plain": (6, 10), "square": (6, 6)}  # a square matrix fits either way round
NAMES = {path.rpartition("/")[2]: row for path, row in TOY.names.items()}


def added(arrays, adapters, gamma):
    """Add the adapters to the tensors by hand, in float64, as the file has them."""
    found = {name: array.astype(np.float64) for name, array in arrays.items()}
    for path, factors in adapters.items():
        *layer, last = path.removeprefix("params/").split("/")
        name, transposed = NAMES[last]
        update = gamma * np.float64(factors["a"]) @ np.float64(factors["b"])
        name = name.replace("{i}", layer[0].removeprefix("h_") if layer else "")
        found[name] = found[name] + (update.T if transposed else update)
    return found


@pytest.fixture(params=SHAPES)
def arrays(request):
    return toy_family.tensors(*SHAPES[request.param])


@pytest.fixture
def made(arrays, tmp_path):
    """Give the model, loaded, and adapters on every matrix of it."""
    model = load_model(toy_family.write(tmp_path / "model", arrays), family=TOY)
    config = rslora.LoraConfig(rank=3, alpha=7, targets=["*/mix", "*/kernel", "*/wte", "*/readout"])
    lora = rslora.wrap(model.apply, model.variables, TOKENS, config=config)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lora.init, jax.random.key(0))
    return model, lora, jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes)


def test_it_is_loaded_and_wrapped(made, arrays):
    model, lora, adapters = made
    assert model.family is TOY and len(lora.sites) == 6
    base, wanted = toy_family.logits(arrays, TOKENS), added(arrays, adapters, 7 / math.sqrt(3))
    np.testing.assert_allclose(model.apply(model.variables, TOKENS), base, atol=1e-5)
    found = lora.apply(model.variables, adapters, TOKENS)
    np.testing.assert_allclose(found, toy_family.logits(wanted, TOKENS), atol=1e-4)
    assert np.abs(found - base).max() > 0.1


def test_it_is_merged_and_loaded_again(made, arrays, tmp_path):
    model, lora, adapters = made
    write_merged(
        tmp_path / "out",
        lora,
        model.variables,
        adapters,
        config=model.config,
        tokenizer=model.tokenizer,
        family=TOY,
        dtype="float32",
    )
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    wanted = added(arrays, adapters, 7 / math.sqrt(3))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)
    again = load_model(tmp_path / "out", family=TOY)
    assert again.config == model.config and again.tokenizer.encode("hi") == model.tokenizer.encode("hi")
    np.testing.assert_allclose(again.apply(again.variables, TOKENS), toy_family.logits(wanted, TOKENS), atol=1e-4)


def test_it_goes_to_peft_and_back(made, tmp_path):
    model, lora, adapters = made
    replaced = {"params/h_1/gain": np.ones(6, np.float32)}
    save_peft(tmp_path / "out", lora, adapters, TOY.names, base_model="me/toy", task_type=None, replaced=replaced)
    tensors = safetensors.load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors, name = adapters["params/h_1/mix"], "base_model.model.h.1.mix"
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    np.testing.assert_allclose(product.T, factors["a"] @ factors["b"], atol=1e-6)
    config = read_config(tmp_path / "out", model.variables, TOY.names)
    again = rslora.wrap(model.apply, model.variables, TOKENS, config=config)
    assert {path: site for path, site in again.sites.items() if site.scaled} == lora.sites
    back = load_peft(tmp_path / "out", again, TOY.names)
    value = {"params/h_1/gain": {"value": np.ones(6)}}  # which is now trained
    jax.tree.map(np.testing.assert_array_equal, back.adapters, adapters | value)
    assert not back.replaced
    alone = load_peft(tmp_path / "out", lora, TOY.names)  # and put into the base where the config does not train it
    assert alone.replaced.keys() == replaced.keys() and (alone.replaced["params/h_1/gain"] == 1).all()


@pytest.mark.parametrize(("last", "transposed"), [("mix", True), ("kernel", False), ("readout", True), ("wte", False)])
def test_a_matrix_that_an_adapter_replaces_lies_as_the_family_says(last, transposed, made, tmp_path):
    model, *_ = made
    path = next(path for path in ("params/h_0/" + last, "params/" + last) if path in leaves(model.variables))
    target = "*/h_1/mix" if last == "mix" else "*/h_0/mix"
    lora = rslora.wrap(model.apply, model.variables, TOKENS, config=rslora.LoraConfig(rank=3, targets=target))
    weight = np.random.default_rng(3).normal(size=leaves(model.variables)[path].shape).astype(np.float32)
    save_peft(tmp_path / "out", lora, lora.init(jax.random.key(0)), TOY.names, replaced={path: weight})
    tensors = safetensors.load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model." + NAMES[last][0].replace("{i}", "0")
    np.testing.assert_array_equal(tensors[name], weight.T if transposed else weight)
    np.testing.assert_array_equal(load_peft(tmp_path / "out", lora, TOY.names).replaced[path], weight)


def leaves(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_commands_take_it_once_it_is_known(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))
    model = toy_family.write(tmp_path / "model", arrays)
    targets = ["*/mix", "*/kernel", "*/readout"]
    lora, loaded, adapters = make_run(tmp_path / "run", model, targets=targets)
    run, out = str(tmp_path / "run"), tmp_path / "merged"
    assert main(["merge", run, "--out", str(out), "--dtype", "float32"]) == 0
    merged = safetensors.load_file(out / "model.safetensors")
    for name, wanted in added(arrays, adapters, 7 / math.sqrt(3)).items():
        np.testing.assert_array_equal(merged[name], wanted.astype(np.float32), err_msg=name)
    assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    assert main(["export", run, "--out", str(tmp_path / "peft")]) == 0
    flags = ["--model", str(model), "--out", str(tmp_path / "again")]
    assert main(["import", str(tmp_path / "peft"), *flags]) == 0
    config, back = checkpoint.load_adapters(tmp_path / "again", params=loaded.variables)
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, adapters))
    assert rslora.wrap(loaded.apply, loaded.variables, TOKENS, config=config).sites == lora.sites
    assert main(["inspect", run]) == 0
    assert main(["inspect", str(tmp_path / "peft"), "--model", str(model), "--out", str(tmp_path / "seen")]) == 0


def test_a_family_that_is_not_known_is_refused_by_name(arrays, tmp_path):
    with pytest.raises(ValueError, match=r"model_type 'toy': only llama, mistral, .* are read"):
        load_model(toy_family.write(tmp_path / "model", arrays))
    with pytest.raises(ValueError, match=r"from which this family is not read: give a Hugging Face folder"):
        load_model(None, family=TOY)


def test_a_model_unpacks_and_gives_its_module(made):
    model, *_ = made
    config, variables, tokenizer = model
    assert (config, variables, tokenizer) == (model.config, model.variables, model.tokenizer)
    assert model.module == TOY.build(config) and jnp.shape(model.apply(variables, TOKENS)) == (2, 3, 24)
