"""The decoders and LoRA configurations of PEFT's own tests (its tests/test_decoder_models.py), both ways."""

from __future__ import annotations

import copy
import functools
import itertools
import os

import jax
import numpy as np
import pytest

import rslora_jax as rslora
from rslora_jax.interop.load import load_model
from rslora_jax.interop.peft import load_peft, read_config, replace, save_peft

from ..test_huggingface import SIZES, small_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.by_day_on("oldest"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MODELS = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "gemma": ("Gemma", dict(head_dim=8)),
    "gemma3": ("Gemma3", dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=5)),
}
TIED = ("llama tied", "gemma", "gemma3")
# What PEFT takes where nothing is named, as most of its tests do: by the kind of model, here q_proj and v_proj.
PLAIN = dict(r=8, lora_alpha=32, lora_dropout=0.05, bias="none", target_modules=None)
CONFIGS = {
    "plain": PLAIN,
    "rslora": PLAIN | dict(use_rslora=True),
    "all-linear": PLAIN | dict(target_modules="all-linear"),
    "gaussian": PLAIN | dict(init_lora_weights="gaussian"),
    "two": PLAIN | dict(target_modules=["down_proj", "up_proj"]),
    "patterns": PLAIN | dict(rank_pattern={"q_proj": 3, "1.self_attn.v_proj": 5}, alpha_pattern={"v_proj": 7}),
    "DoRA": PLAIN | dict(use_dora=True),
    "one layer": PLAIN | dict(layers_to_transform=[1]),
    "table": dict(target_modules=["lin0", "embed_tokens"], init_lora_weights=False),
    "table by pattern": dict(target_modules=r".*\.embed_tokens", init_lora_weights=False),
    "table and layers": PLAIN | dict(target_modules=["embed_tokens", "q_proj"]),
    "head": PLAIN | dict(target_modules=["lm_head", "q_proj"]),
    "saved head": PLAIN | dict(modules_to_save=["lm_head"]),
    "saved table": PLAIN | dict(modules_to_save=["embed_tokens"]),
    "saved norms": PLAIN | dict(modules_to_save=["input_layernorm"]),
    "biases": PLAIN | dict(bias="all", use_rslora=True),
    "tokens": PLAIN | dict(trainable_token_indices=[7, 1, 3], use_rslora=True),
    "tokens of both": PLAIN | dict(trainable_token_indices={"embed_tokens": [80, 4], "lm_head": [80, 4]}),
    "biases of its own": PLAIN | dict(bias="lora_only", target_modules=["q_proj", "k_proj"]),
    "biases of a layer": PLAIN | dict(bias="lora_only", layers_to_transform=[1]),
    "biases and modules": PLAIN | dict(bias="all", modules_to_save=["k_proj", "norm"]),
}
# What PEFT has beside LoRA is refused, each in one sentence that names it.
REFUSED = {
    "aLoRA": (PLAIN | dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "bias in B": (PLAIN | dict(lora_bias=True), "lora_bias"),
    "replicated": (PLAIN | dict(layer_replication=[[0, 1], [0, 2]]), "layer_replication"),
    "PiSSA": (PLAIN | dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "parameters": (
        PLAIN | dict(target_modules=[], target_parameters=["q_proj.weight"], lora_dropout=0),
        "target_parameters",
    ),
}
DAY = {("llama", "patterns"), ("llama", "saved head"), ("qwen2", "biases"), ("llama tied", "tokens"), ("gemma3", "two")}
CASES = [
    pytest.param(*case, marks=() if case in DAY else pytest.mark.nightly) for case in itertools.product(MODELS, CONFIGS)
]
TOKENS = np.random.default_rng(0).integers(3, 90, (2, 9))


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Give a function from a kind to transformers' model and what is loaded here of its folder."""

    @functools.cache
    def make(kind):
        name, changes = MODELS[kind]
        named = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
        torch.manual_seed(0)
        sizes = SIZES | dict(num_hidden_layers=2, initializer_range=0.3)
        config = getattr(transformers, named)(**sizes | changes, attn_implementation="eager")
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        folder = tmp_path_factory.mktemp("base")
        model.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
        return model, load_model(folder)

    return make


def adapted(model, config):
    """Give PEFT's model with every trained number moved; its fresh B is zero, which would hide it."""
    torch.manual_seed(1)
    found = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for weight in found.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape)
    return found.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_an_adapter_gives_its_logits_here_and_again_in_peft(kind, case, model_of, tmp_path):
    model, ours = model_of(kind)
    theirs = adapted(model, CONFIGS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits(theirs)
    assert np.abs(want - logits(model)).max() > 1e-2 * np.abs(want).max()
    try:
        config = read_config(tmp_path / "theirs", ours.variables)
        lora = rslora.wrap(ours.apply, ours.variables, TOKENS, config=config)
        adapters, replaced = load_peft(tmp_path / "theirs", lora)
        variables = replace(ours.variables, replaced)
    except ValueError as error:
        # A weight of its own for one of a table's two uses has no place in a model that has one table.
        assert kind in TIED and case.startswith("saved") and "give the model a head of its own" in str(error)
        pytest.skip("a table that is the head too: refused")
    close(jax.jit(lora.apply)(variables, adapters, TOKENS), want)
    save_peft(tmp_path / "again", lora, adapters, replaced=replaced, params=variables)
    close(logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "again").eval()), want)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_an_adapter_of_here_gives_its_logits_in_peft(kind, scaling, model_of, tmp_path):
    model, ours = model_of(kind)
    config = rslora.LoraConfig(rank=6, alpha=7, scaling=scaling, rank_pattern={"*/mlp/*": 3})
    lora = rslora.wrap(ours.apply, ours.variables, TOKENS, config=config)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype("float32"), lora.init(jax.random.key(0))
    )
    want = np.asarray(jax.jit(lora.apply)(ours.variables, adapters, TOKENS))
    assert np.abs(want - logits(model)).max() > 1e-2 * np.abs(want).max()
    save_peft(tmp_path / "out", lora, adapters)
    close(logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()), want)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(case, model_of, tmp_path):
    config, message = REFUSED[case]
    model, ours = model_of("llama")
    adapted(model, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path, ours.variables)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
