"""PEFT's folders without PEFT: what vLLM gets, what has no form there, and the commands."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import rslora_jax as rslora
from rslora_jax.cli import main
from rslora_jax.interop.names import Weight
from rslora_jax.interop.new_folder import written_whole
from rslora_jax.interop.peft import check_vllm, load_peft, read_config, replace, save_peft
from rslora_jax.models.decoder import Decoder
from rslora_jax.sites import named_leaves
from rslora_jax.store import checkpoint

from .folders import CONFIG, Q0, TOKENS, edit, edit_tensors, llama, random_adapters, same, shapes_of, wrapped

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


@pytest.mark.parametrize("rslora_too", [None, True])
def test_vllm_gets_one_rank_and_one_scale(tmp_path, rslora_too):
    config = rslora.LoraConfig(
        rank=20,
        alpha=12,
        targets=["all-linear", "*/lm_head/*"],
        rank_pattern={"*/mlp/*": 3},
        alpha_pattern={"*/q_proj/*": 2.5},
        allow_large_rank=True,
    )
    with pytest.warns(rslora.RsloraWarning):
        one = wrapped(llama(), config)
    adapters = random_adapters(one)
    save_peft(tmp_path / "peft", one, adapters)
    with pytest.raises(ValueError, match="rank_pattern"):
        check_vllm(tmp_path / "peft")
    save_peft(tmp_path / "vllm", one, adapters, server="vllm", use_rslora=rslora_too)
    assert check_vllm(tmp_path / "vllm") == 32
    said = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (said["r"], said["use_rslora"]) == (20, bool(rslora_too))
    assert said["lora_alpha"] == pytest.approx(12 if rslora_too else 12 * 20**0.5)
    assert not said["rank_pattern"] and not said["alpha_pattern"] and said["modules_to_save"] is None
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    for path, name in (("mlp/up_proj", "mlp.up_proj"), ("attn/q_proj", "self_attn.q_proj"), ("attn/o_proj",) * 2):
        path, name = (
            f"params/layers/{path}/kernel",
            f"base_model.model.model.layers.1.{name.replace('attn/', 'self_attn.')}",
        )
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 20
        factors = adapters[path]
        want = one.sites[path].gamma * factors["a"][1].astype(np.float64) @ factors["b"][1]
        np.testing.assert_allclose(12 / 20**0.5 * b.astype(np.float64) @ a, want.T, rtol=1e-5, atol=1e-5)
    # What already has the scale keeps its numbers.
    same(tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"],
         adapters["params/layers/attn/o_proj/kernel"]["b"][1].T)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(alpha_pattern={"q_proj": 3}), "alpha_pattern"),
        (dict(use_rslora="absent"), "does not say use_rslora"),
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias"),
        (dict(r=513), "above 512"),
        (dict(r=6), "has ranks"),
        (dict(target_modules="absent"), "lacks target_modules"),
    ],
)
def test_check_vllm_refuses(fields, said, folder):
    assert check_vllm(folder) == 8
    edit(folder, **fields)
    with pytest.raises(ValueError, match=said):
        check_vllm(folder)


def test_check_vllm_refuses_tensors_it_does_not_know(folder):
    edit_tensors(folder, lambda t: t | {f"{Q0}.base_layer.weight": np.ones((12, 12), np.float32)})
    with pytest.raises(ValueError, match="no factor of an adapter"):
        check_vllm(folder)


def test_half_precision_and_what_does_not_fit_it(lora, tmp_path):
    adapters = random_adapters(lora)
    save_peft(tmp_path / "b", lora, adapters, dtype="bfloat16")
    back, _ = load_peft(tmp_path / "b", lora)
    same(back, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), adapters))
    adapters["params/layers/attn/q_proj/kernel"]["b"][0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="not finite in float16"):
        save_peft(tmp_path / "h", lora, adapters, dtype="float16")
    assert not (tmp_path / "h").exists()


def test_what_peft_has_no_form_for_is_refused(tmp_path):
    def experts(params, x_ExBxI):
        return jnp.einsum("ebi,eio->ebo", x_ExBxI, params["w"])

    one = rslora.wrap(experts, {"w": jnp.ones((3, 6, 4))}, jnp.ones((3, 2, 6)), config=rslora.LoraConfig(rank=2))
    with pytest.raises(ValueError, match="PEFT has adapters for one matrix each"):
        save_peft(tmp_path / "out", one, one.init(jax.random.key(0)), {"w": "experts.weight"})
    assert not list(tmp_path.iterdir())


def test_a_convolution_in_groups_is_refused(tmp_path):
    def grouped(params, x):
        numbers = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=3
        )

    config = rslora.LoraConfig(rank=2, alpha=3, targets="w")
    one = rslora.wrap(grouped, {"w": jnp.ones((3, 4, 12))}, jnp.ones((2, 5, 12)), config=config)
    with pytest.raises(ValueError, match="w is the kernel of a convolution in 3 groups"):
        save_peft(tmp_path / "out", one, one.init(jax.random.key(0)), {"w": Weight("conv.weight", transposed=True)})
    assert not list(tmp_path.iterdir())


def test_a_square_weight_that_comes_turned_is_refused():
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal((5, 5)).astype(np.float32) for name in ("square", "other")}
    change = {"square": base["square"] + np.float32(0.1) * base["other"], "other": 2 - base["square"]}
    assert (replace(base, change)["square"] == change["square"]).all()
    with pytest.raises(ValueError, match="square comes with its axes the other way round"):
        replace(base, {"square": change["square"].T})


def test_one_use_of_a_tied_table_alone_is_no_adapter_of_both(lora, tmp_path, folder):
    tied = wrapped(llama(tied=True), rslora.LoraConfig(rank=5, alpha=12, targets="*/embedding"))
    save_peft(tmp_path / "tied", tied, random_adapters(tied))
    load_peft(tmp_path / "tied", tied)
    edit(tmp_path / "tied", ensure_weight_tying="absent")
    load_peft(tmp_path / "tied", tied)  # both uses are adapted, and alike
    edit_tensors(tmp_path / "tied", lambda t: t | {"base_model.model.lm_head.lora_A.weight": np.ones((5, 12), "f4")})
    with pytest.raises(ValueError, match="each in its own way"):
        load_peft(tmp_path / "tied", tied)
    edit(tmp_path / "tied", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="does not adapt params/embed/embedding, as this config does"):
        load_peft(tmp_path / "tied", tied)
    assert read_config(tmp_path / "tied", shapes_of(llama(tied=True))).targets == ("params/embed/embedding@lookup",)


def test_folders_are_written_whole(tmp_path):
    with pytest.raises(RuntimeError), written_whole(tmp_path / "new" / "out") as out:
        (out / "half").write_text("half")
        raise RuntimeError
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").write_text("")
    for taken, said in ((tmp_path / "full", "is not empty"), (tmp_path / "full" / "theirs", "is a file")):
        with pytest.raises(ValueError, match=said), written_whole(taken):
            pass
    (tmp_path / "empty").mkdir()
    with written_whole(tmp_path / "empty") as out:
        (out / "whole").write_text("")
    assert [path.name for path in tmp_path.rglob("whole")] == ["whole"]
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "full").stat().st_mode


def test_a_run_goes_to_peft_and_back(tiny, tmp_path, capsys):
    model = tiny.write(tmp_path / "tiny.gguf")
    from rslora_jax.interop.load import load_model

    config, variables, _ = load_model(model)
    one = rslora.wrap(Decoder(config).apply, variables, TOKENS, config=CONFIG)
    adapters = random_adapters(one)
    about = checkpoint.describe(CONFIG, variables, {"model": str(model)})
    with checkpoint.open_checkpoints(tmp_path / "run") as runs:
        checkpoint.save(runs, 3, adapters, {"step": np.int32(3)}, about, 1.0)
    out = ["--out", str(tmp_path / "out")]
    for extra, said in (
        (["--step", "4"], "no checkpoint of step 4"),
        (["--step", "first"], "neither last, best nor the number of a step"),
        (["--model", "missing.gguf"], "missing.gguf"),
    ):
        assert main(["export", str(tmp_path / "run"), *out, *extra]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "run"), *out, "--step", "best", "--for", "vllm", "--base-model", "me/b"]) == 0
    assert "vllm serve me/b --enable-lora --max-lora-rank 8 --lora-modules out=" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), *out]) == 2
    assert "is not empty" in capsys.readouterr().err

    again = ["import", str(tmp_path / "out"), "--model", str(model), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    config_2, back = checkpoint.load_adapters(tmp_path / "again", params=variables)
    same(back, adapters)
    lora_2 = rslora.wrap(Decoder(config).apply, variables, TOKENS, config=config_2)
    # The same scale, written as alpha / r.
    assert [site.gamma for site in lora_2.sites.values()] == pytest.approx([12 / 5**0.5] * 2)
    assert lora_2.sites.keys() == one.sites.keys()
    assert checkpoint.load_about(tmp_path / "again")["settings"]["model"] == str(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "run", "tiny.gguf"]
    assert set(named_leaves(back)) == set(named_leaves(adapters))
    assert main(["export", str(tmp_path / "again"), "--out", str(tmp_path / "out2")]) == 0
    whole = shutil.copytree(tmp_path / "out2", tmp_path / "whole")
    edit(whole, modules_to_save=["lm_head"])
    edit_tensors(whole, lambda t: t | {"base_model.model.lm_head.weight": np.ones((10, 32), np.float32)})
    assert main(["import", str(whole), "--model", str(model), "--out", str(tmp_path / "head")]) == 0
    config_3, back = checkpoint.load_adapters(tmp_path / "head", params=variables)
    assert config_3.trained == ("params/lm_head/kernel",)
    same(back["params/lm_head/kernel"]["value"], np.ones((32, 10)))
    # A table that was resized is saved along, and is no adapter.
    edit_tensors(whole, lambda t: t | {"base_model.model.model.embed_tokens.weight": np.ones((10, 32), np.float32)})
    assert main(["import", str(whole), "--model", str(model), "--out", str(tmp_path / "no")]) == 2
    assert "replaces the base's params/embed/embedding" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "out2"))
    same(one, two)
