"""The scale of every module, as each reader would compute it from the folder: by its own rule, written down here."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import rslora_jax as rslora
from rslora_jax.interop.peft import check_server, read_config, save_peft
from rslora_jax.interop.peft.patterns import exact_patterns

from .folders import CONFIG, llama, random_adapters, shapes_of, wrapped

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]


def peft_0_14(patterns, module, usual):
    key = next((key for key in patterns if re.match(rf".*\.{key}$", module)), module)
    return patterns.get(key, usual)


def peft_0_15(patterns, module, usual):
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
    return patterns.get(key, usual)


PEFTS = {"0.14": peft_0_14, "0.15 to 0.21": peft_0_15}
# Few words, so that names end with one another, and one that a dot in another matches.
NAMES = st.lists(st.sampled_from(["a", "b", "q_proj", "1", "a.b", "aXb"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(own=st.dictionaries(NAMES, st.sampled_from([3, 5, 8]), min_size=1, max_size=8), resaved=st.booleans())
def test_every_version_of_peft_gives_every_module_its_own(own, resaved):
    patterns = exact_patterns(own, 3)
    # PEFT sorts the keys when it saves a folder again.
    patterns = json.loads(json.dumps(patterns, sort_keys=resaved))
    for version, read in PEFTS.items():
        assert {module: read(patterns, module, 3) for module in own} == own, (version, patterns)


def test_a_name_that_is_the_end_of_no_other_is_its_own_pattern():
    own = {f"model.layers.{n}.mlp.up_proj": 3 + n for n in range(12)}
    assert exact_patterns(own, 3) == {name: value for name, value in own.items() if value != 3}


CONFIGS = {
    "one rank": dict(rank=3, alpha=7),
    "patterns": dict(
        rank=4, alpha=16, rank_pattern={"*/mlp/*": 7, "*/q_proj/*": 2}, alpha_pattern={"*/{q,up}_proj/*": 5.5}
    ),
    "of lora": dict(rank=4, alpha=16, scaling="lora", rank_pattern={"*/mlp/*": 7}),
    "constant": dict(rank=4, alpha=1.5, scaling="constant", rank_pattern={"*/mlp/*": 7}),
    "a function": dict(rank=4, alpha=1.5, scaling=lambda rank: rank**-0.25, rank_pattern={"*/mlp/*": 7}),
}


def updates(folder, scale):
    """Give gamma B A of every module, by a reader's own scale of (its config, the module)."""
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.partition(".lora_")[0] for name in tensors}
    found = {}
    for module in modules:
        down, up = (tensors[f"{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        found[module] = scale(said, module.removeprefix("base_model.model.")) * up @ down
    return found


def by_peft(read):
    def scale(said, module):
        rank, alpha = (
            read(said[f"{n}_pattern"], module, said[of]) for n, of in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        return alpha / rank**0.5 if said["use_rslora"] else alpha / rank

    return scale


def one_for_all(said, module):
    """Serve at one scale, as vLLM, SGLang and llama.cpp do; the last two know no use_rslora."""
    return said["lora_alpha"] / said["r"]


def by_hand(lora, adapters):
    found = {}
    for path, site in lora.sites.items():
        name = path.removeprefix("params/layers/").removesuffix("/kernel").replace("attn/", "self_attn/")
        for layer in range(2):
            a, b = (adapters[path][one][layer].astype(np.float64) for one in "ab")
            gamma = {"rslora": site.alpha / site.rank**0.5, "lora": site.alpha / site.rank, "constant": site.alpha}.get(
                lora.config.scaling, site.alpha * site.rank**-0.25
            )
            found[f"base_model.model.model.layers.{layer}.{name.replace('/', '.')}"] = gamma * (a @ b).T
    return found


def close(found, want):
    assert found.keys() == want.keys()
    for module, update in want.items():
        np.testing.assert_allclose(found[module], update, rtol=1e-5, atol=1e-5, err_msg=module)


BY_DAY = ("patterns", "a function")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in BY_DAY else pytest.mark.nightly) for c in CONFIGS])
def test_every_reader_gives_every_module_its_update(case, tmp_path):
    lora = wrapped(llama(), rslora.LoraConfig(**CONFIGS[case]))
    adapters = random_adapters(lora)
    want = by_hand(lora, adapters)
    for formula in (None, True, False):
        folder = tmp_path / f"peft-{formula}"
        save_peft(folder, lora, adapters, use_rslora=formula)
        said = json.loads((folder / "adapter_config.json").read_text())
        assert said["use_rslora"] is (lora.config.scaling == "rslora" if formula is None else formula)
        for read in PEFTS.values():
            close(updates(folder, by_peft(read)), want)
        back = wrapped(llama(), read_config(folder, shapes_of(llama())))
        for path, site in lora.sites.items():
            assert (back.sites[path].rank, back.sites[path].gamma) == (site.rank, pytest.approx(site.gamma, rel=1e-12))
    for server in ("vllm", "sglang", "gguf"):
        save_peft(tmp_path / server, lora, adapters, server=server)
        check_server(tmp_path / server, server)
        close(updates(tmp_path / server, one_for_all), want)
        close(updates(tmp_path / server, by_peft(peft_0_14)), want)


def test_who_takes_no_account_of_use_rslora_is_not_given_it(tmp_path):
    lora = wrapped(llama(), CONFIG)
    for server in ("sglang", "gguf"):
        with pytest.raises(ValueError, match="takes alpha / r whatever use_rslora says"):
            save_peft(tmp_path / "out", lora, random_adapters(lora), server=server, use_rslora=True)
        if not (tmp_path / "rslora").exists():
            save_peft(tmp_path / "rslora", lora, random_adapters(lora))
        with pytest.raises(ValueError, match=f"has use_rslora, and .*: export it with --for {server}"):
            check_server(tmp_path / "rslora", server)
    check_server(tmp_path / "rslora", "vllm")
    with pytest.raises(ValueError, match="server='lorax' is not known: use vllm, sglang, gguf"):
        save_peft(tmp_path / "out", lora, random_adapters(lora), server="lorax")
    assert not (tmp_path / "out").exists()
