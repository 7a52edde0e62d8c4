"""PEFT's folders without PEFT: what comes back bit for bit, what is obeyed, and what is refused."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

import rslora_jax as rslora
from rslora_jax.cli import main
from rslora_jax.interop.peft import load_peft, read_config, save_peft

from .folders import CONFIG, Q0, both, edit, edit_tensors, llama, random_adapters, same, shapes_of, wrapped

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


@pytest.mark.parametrize("scan", [True, False])
def test_what_is_written_comes_back_bit_for_bit(scan, tmp_path):
    model = llama(scan)
    config = rslora.LoraConfig(
        rank=5,
        alpha=12,
        targets=["all-linear", "*/lm_head/kernel", "*/embedding"],
        rank_pattern={"*/mlp/*": 7, "*/embedding": 3, "*/{k,v}_proj/*": 4},
        alpha_pattern={"*/q_proj/*": 2.5},
    )
    one = wrapped(model, config)
    adapters = random_adapters(one)
    save_peft(tmp_path / "a", one, adapters)
    again = wrapped(model, read_config(tmp_path / "a", shapes_of(model)))
    assert again.sites == one.sites
    back, replaced = load_peft(tmp_path / "a", again)
    same(back, adapters)
    assert replaced == {}
    save_peft(tmp_path / "b", again, back)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


KNOWN = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "auto_mapping",
    "revision",
}


def test_the_config_says_use_rslora_and_only_what_peft_has_long_known(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 5, 12)
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert set(config) == KNOWN


@pytest.mark.parametrize("use_rslora", [True, False, "absent"])
def test_use_rslora_is_obeyed(use_rslora, folder):
    edit(folder, use_rslora=use_rslora)
    config = read_config(folder, shapes_of(llama()))
    site = wrapped(llama(), config).sites["params/layers/attn/q_proj/kernel"]
    assert site.gamma == pytest.approx(12 / 5**0.5 if use_rslora is True else 12 / 5)


def test_layers_of_other_ranks_and_scales_give_the_same_product(folder, lora):
    def change(tensors):
        tensors[f"{Q0}.lora_A.weight"] = tensors[f"{Q0}.lora_A.weight"][:3]
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"][:, :3]

    edit(folder, rank_pattern={"0.self_attn.q_proj": 3}, alpha_pattern={"layers.0.self_attn.q_proj": 7})
    edit_tensors(folder, change)
    tensors = load_file(folder / "adapter_model.safetensors")
    for config in (read_config(folder, shapes_of(llama())), CONFIG):
        one = wrapped(llama(), config)
        site = one.sites["params/layers/attn/q_proj/kernel"]
        assert (site.rank, site.alpha) == (5, 12)
        factors = load_peft(folder, one).adapters[site.path]
        a, b = tensors[f"{Q0}.lora_A.weight"], tensors[f"{Q0}.lora_B.weight"]
        want = 7 / 3**0.5 * (b.astype(np.float64) @ a).T
        gamma = site.of_layer(0).gamma
        np.testing.assert_allclose(gamma * factors["a"][0] @ factors["b"][0], want, rtol=1e-5, atol=1e-5)
        if site.layers:  # as read from the file, each layer has its own numbers
            assert gamma == pytest.approx(7 / 3**0.5)
            same(factors["b"][0, :3], b.T)
        same(factors["a"][0, :, 3:], np.zeros((12, 2)))
        same(factors["b"][0, 3:], np.zeros((2, 12)))
        same(factors["b"][1], tensors[f"{Q0.replace('0', '1')}.lora_B.weight"].T)  # untouched


def test_a_layer_that_is_left_out_gets_zeros(folder, lora):
    edit(folder, layers_to_transform=[1])
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if ".layers.1." in n})
    adapters, _ = both(folder, lora)
    for factors in adapters.values():
        assert not factors["a"][0].any() and not factors["b"][0].any()
        assert factors["a"][1].any() and factors["b"][1].any()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(peft_type="IA3"), "peft_type 'IA3'"),
        (dict(lora_dropout=1.0), "lora_dropout 1.0"),
        (dict(bias="vera_only"), "bias 'vera_only'"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(megatron_config={"a": 1}), "megatron_config"),
        (dict(layer_replication=[[0, 2]]), "layer_replication"),
        (dict(trainable_token_indices=[99]), "trains the rows [99] of params/embed/embedding, and this config []"),
        (dict(trainable_token_indices=[1, 1]), "trainable_token_indices"),
        (dict(trainable_token_indices={"lin": [1]}), "for lin, which is no module of this model"),
        (dict(target_parameters=["x"]), "target_parameters"),
        (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (dict(use_qalora=True), "use_qalora"),
        (dict(a_field_to_come=0.5), "a_field_to_come=0.5"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (dict(init_lora_weights="OLoRA"), "changes the base's own weights"),
        (dict(r="absent"), "lacks r"),
        (dict(r=0), "rank 0"),
        (dict(r=True), "r=true"),
        (dict(r="5"), 'r="5"'),
        (dict(lora_alpha=float("nan")), "lora_alpha nan"),
        (dict(lora_alpha=-3), "lora_alpha -3"),
        (dict(use_rslora="yes"), 'use_rslora="yes"'),
        (dict(rank_pattern=[3]), "rank_pattern"),
        (dict(rank_pattern={"q_proj": "3"}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj(": 3}), "no regular expression"),
        (dict(target_modules=["nothing"]), "adapts no module of this model"),
        (dict(target_modules="nothing("), "no regular expression"),
        (dict(target_modules={"q_proj": 1}), "target_modules"),
        (dict(target_modules=[1]), "target_modules"),
        (dict(target_modules=["q_proj"]), "does not adapt params/layers/mlp/up_proj/kernel"),
        (dict(target_modules=["q_proj", "up_proj", "down_proj"]), "adapts model.layers.0.mlp.down_proj"),
        (dict(layers_to_transform=[1]), "for which the model or adapter_config.json has no place"),
        (dict(rank_pattern={"up_proj": 4}), "has shape (5, 12), where"),
        (dict(modules_to_save=["lm_head"]), "lacks base_model.model.lm_head.weight"),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_name(fields, said, folder, lora):
    edit(folder, **fields)
    with pytest.raises(ValueError, match=re.escape(said)):
        both(folder, lora)


def test_harmless_fields_are_passed_over(folder, lora):
    edit(
        folder,
        lora_dropout=0.1,
        revision="main",
        auto_mapping={"a": "b"},
        eva_config={"rho": 2},
        init_lora_weights="eva",
    )
    edit(
        folder, megatron_core="megatron.core", qalora_group_size=16, peft_version="0.21", task_type=None, use_dora=None
    )
    edit(folder, a_field_to_come=None, another=False, fan_in_fan_out=True)
    adapters, _ = both(folder, lora)
    same(adapters, random_adapters(lora))


def test_all_linear_is_what_the_file_holds(folder, lora):
    edit(folder, target_modules="all-linear")
    assert wrapped(llama(), read_config(folder, shapes_of(llama()))).sites == lora.sites
    same(load_peft(folder, lora).adapters, random_adapters(lora))


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: t[n] for n in t if n != f"{Q0}.lora_B.weight"}, f"lacks {Q0}.lora_B.weight"),
        (rename(f"{Q0}.lora_A.weight", "../../../etc/passwd"), "holds ../../../etc/passwd"),
        (lambda t: t | {"base_model.model.../x": np.ones(2, np.float32)}, "holds base_model.model.../x"),
        (lambda t: t | {f"{Q0}.lora_magnitude_vector": np.ones(12, np.float32)}, "lora_magnitude_vector"),
        (lambda t: t | {f"{Q0}.lora_B.bias": np.ones(12, np.float32)}, "lora_B.bias"),
        (lambda t: t | {f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"].T}, "has shape (12, 5)"),
        (lambda t: t | {f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"].astype(np.float64)}, "dtype F64"),
        (lambda t: t | {f"{Q0}.lora_A.weight": np.ones((5, 12), np.int8)}, "as I8, and only F64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, said, folder, lora):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=re.escape(said)):
        both(folder, lora)


def spoil(folder, how):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-7])
    if how == "within its header":
        path.write_bytes(data[:100])
    if how == "empty":
        path.write_bytes(b"")
    if how == "a header of 2 GB":
        path.write_bytes(struct.pack("<Q", 2 << 30) + data[8:])
    if how == "no JSON":
        path.write_bytes(data[:8] + b"x" * (len(data) - 8))
    if how == "an unknown dtype":
        path.write_bytes(data.replace(b'"F32"', b'"Q32"'))
    if how == "a pickle":
        path.rename(path.with_suffix(".bin"))
    if how == "nothing":
        path.unlink()
    config = folder / "adapter_config.json"
    if how == "a config that is no JSON":
        config.write_text("{")
    if how == "a config that is a list":
        config.write_text("[" * 100_000)
    if how == "no config":
        config.unlink()


SPOILT = {
    "truncated": "is cut off within tensor",
    "within its header": "is cut off within its header",
    "empty": "is cut off within its header",
    "a header of 2 GB": "says that its header has 2147483648 bytes",
    "no JSON": "is damaged",
    "an unknown dtype": "as Q32, and only F64, F32",
    "a pickle": "adapter_model.bin is a pickle",
    "nothing": "adapter_model.safetensors is not there",
    "a config that is no JSON": "is damaged: its JSON cannot be read",
    "a config that is a list": "is damaged: its JSON cannot be read",
    "no config": "adapter_config.json is not there",
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_files_are_one_sentence_and_leave_nothing(how, folder, tmp_path, capsys):
    spoil(folder, how)
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rslora: error: ") and said.count("\n") == 1 and SPOILT[how] in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("form", ["lm_head.weight", "lm_head.modules_to_save.weight"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_saved_module_is_trained_by_each_of_its_names(form, beside, folder):
    value, was = np.random.default_rng(0).normal(size=(2, 19, 12)).astype("f4")
    prefix = "base_model.model."
    more = {f"{prefix}{form}": value} | ({f"{prefix}lm_head.original_module.weight": was} if beside else {})
    edit(folder, modules_to_save=["lm_head"])
    edit_tensors(folder, lambda tensors: tensors | more)
    config = read_config(folder, shapes_of(llama()))
    assert config.trained == ("params/lm_head/kernel",)
    adapters, replaced = load_peft(folder, wrapped(llama(), config))
    same(adapters["params/lm_head/kernel"]["value"], value.T)
    assert not replaced
