"""PEFT's adapters of tables that are heads too, on transformers' Flax models beside the same in torch."""

import copy
import importlib
import os

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import rslora_jax as rslora
from rslora_jax.interop import Weight
from rslora_jax.interop.peft import load_peft, read_config, replace, save_peft
from rslora_jax.sites import named_leaves
from tests.reference import trained

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::rslora_jax.RsloraWarning"),
]

SMALL = dict(vocab_size=50, pad_token_id=1)
SEQ2SEQ = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32)
SEQ2SEQ |= dict(encoder_attention_heads=2, decoder_attention_heads=2, d_model=16)
MODELS = {
    "gpt2": ("GPT2", "LMHeadModel", dict(n_positions=32, n_embd=16, n_layer=2, n_head=2), "transformer/wte"),
    "opt": (
        "OPT",
        "ForCausalLM",
        dict(hidden_size=16, num_hidden_layers=1, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16),
        "model/decoder/embed_tokens",
    ),
    "t5": ("T5", "ForConditionalGeneration", dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2), "shared"),
    "bart": ("Bart", "ForConditionalGeneration", SEQ2SEQ, "model/shared"),
}
IDS = np.random.default_rng(0).integers(3, 50, (2, 6))
ANSWER = np.random.default_rng(1).integers(3, 50, (2, 4))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Give (transformers' model in torch, the same in Flax) by family, each made once."""
    import tests.zoo.pretrained  # noqa: F401  (T5's module needs it)

    made = {}

    def of(family):
        if family not in made:
            torch.manual_seed(0)
            kind, head, options, _ = MODELS[family]
            config = getattr(transformers, f"{kind}Config")(**options, **SMALL, initializer_range=0.3)
            config.dropout_rate = config.dropout = 0.0
            model = getattr(transformers, f"{kind}{head}")(config).eval()
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            module = importlib.import_module(f"transformers.models.{family}.modeling_flax_{family}")
            made[family] = model, getattr(module, f"Flax{kind}{head}").from_pretrained(folder, from_pt=True)
        return made[family]

    return of


def torch_logits(model, family):
    more = {} if family in ("gpt2", "opt") else {"decoder_input_ids": torch.tensor(ANSWER)}
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), **more).logits.numpy()


def flax_logits(model, family):
    if family in ("gpt2", "opt"):
        return lambda params, ids: model(ids, params=params).logits
    return lambda params, ids: model(ids, decoder_input_ids=ANSWER, params=params).logits


def names_of(params, family, head=True):
    """Give the table of names: paths with dots, and the head's where the table is it."""
    leaf = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
    names = {}
    for path in flatten_dict(params, sep="/"):
        stem, _, last = path.rpartition("/")
        name = ".".join(part for part in (stem.replace("/", "."), leaf.get(last, last)) if part)
        names[path] = Weight(name, transposed=last == "kernel")
    return names | ({f"{MODELS[family][3]}/embedding@product": "lm_head.weight"} if head else {})


def adapter_of(base, folder, **fields):
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **fields))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


CASES = {
    "gpt2 look-up": ("gpt2", dict(target_modules=["wte"]), {"lookup"}),
    "gpt2 each": (
        "gpt2",
        dict(target_modules=["wte", "lm_head", "c_proj"], rank_pattern={"lm_head": 2}),
        {"lookup", "product"},
    ),
    "gpt2 head": ("gpt2", dict(target_modules=["lm_head"]), {"product"}),
    "gpt2 tie that is none": ("gpt2", dict(target_modules=["wte"], ensure_weight_tying=True), {"lookup"}),
    "gpt2 tied": ("gpt2", dict(target_modules=["wte", "lm_head"], ensure_weight_tying=True), {""}),
    "opt look-up": ("opt", dict(target_modules=["embed_tokens"]), {"lookup"}),
    "opt tied": ("opt", dict(target_modules=["embed_tokens"], ensure_weight_tying=True), {""}),
    "opt each": ("opt", dict(target_modules=["embed_tokens", "lm_head"]), {"lookup", "product"}),
    "t5 head": ("t5", dict(target_modules=["lm_head", "q", "wo"]), {"", "product"}),
    "bart head": ("bart", dict(target_modules=["lm_head", "fc1"]), {"", "product"}),
}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("case", [c if c == "gpt2 each" else pytest.param(c, marks=pytest.mark.nightly) for c in CASES])
def test_an_adapter_of_a_table_changes_what_it_changes_in_torch(case, head, models, tmp_path):
    family, fields, uses = CASES[case]
    base, model = models(family)
    if not head and uses != {"lookup"}:
        return  # the head's module has no place then, and is refused
    theirs = adapter_of(base, tmp_path / "theirs", **fields)
    want = torch_logits(theirs, family)
    assert np.abs(want - torch_logits(base, family)).max() > 0.1
    names, run = names_of(model.params, family, head), flax_logits(model, family)
    lora = rslora.wrap(run, model.params, IDS, config=read_config(tmp_path / "theirs", model.params, names))
    assert {
        site.use for site in lora.sites.values() if not (site.use == "" and site.kind == "linear" and "" not in uses)
    } == uses
    adapters, replaced = load_peft(tmp_path / "theirs", lora, names)
    params = replace(model.params, replaced)
    np.testing.assert_allclose(jax.jit(lora.apply)(params, adapters, IDS), want, rtol=0, atol=1e-4 * np.abs(want).max())

    save_peft(tmp_path / "again", lora, adapters, names, task_type=None)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    np.testing.assert_allclose(torch_logits(again, family), want, rtol=0, atol=1e-4 * np.abs(want).max())


REFUSED = {
    "t5 shared": ("t5", dict(target_modules=["shared"]), "shared/embedding is looked up in 2 places"),
    "bart shared": ("bart", dict(target_modules=["shared", "fc1"]), "model/shared/embedding is looked up in 2 places"),
    "bart embed_tokens": ("bart", dict(target_modules=["embed_tokens", "fc1"]), "the model or .* has no place"),
    "gpt2 saved": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["wte"]), "weight for the lookup of"),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_one_weight_is_refused(case, models, tmp_path):
    family, fields, said = REFUSED[case]
    base, model = models(family)
    adapter_of(base, tmp_path / "theirs", **fields)
    for head in (True, False):
        names = names_of(model.params, family, head)
        config = read_config(tmp_path / "theirs", model.params, names)
        lora = rslora.wrap(flax_logits(model, family), model.params, IDS, config=config)
        with pytest.raises(ValueError, match=said):
            replace(model.params, load_peft(tmp_path / "theirs", lora, names).replaced)


@pytest.mark.nightly
@pytest.mark.parametrize("family", MODELS)
def test_adapters_of_tables_go_to_peft_or_are_refused(family, models, tmp_path):
    base, model = models(family)
    run, path = flax_logits(model, family), f"{MODELS[family][3]}/embedding"
    for use in ("", "@lookup", "@product"):
        config = rslora.LoraConfig(rank=3, alpha=5, targets=path + use)
        lora = rslora.wrap(run, model.params, IDS, config=config)
        assert lora.tied == (path,) and [*lora.sites] == [path + use]
        adapters, names = trained(lora, scale=0.3), names_of(model.params, family)
        if family in ("t5", "bart") and use != "@product":
            with pytest.raises(ValueError, match="in torch each may be a module of its own"):
                save_peft(tmp_path / "out", lora, adapters, names, task_type=None)
            continue
        out = tmp_path / f"out{use}"
        save_peft(out, lora, adapters, names, task_type=None)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
        want = np.asarray(jax.jit(lora.apply)(model.params, adapters, IDS))
        assert np.abs(want - torch_logits(base, family)).max() > 0.05
        np.testing.assert_allclose(torch_logits(theirs, family), want, rtol=0, atol=1e-4 * np.abs(want).max())
        if use != "@lookup":
            with pytest.raises(ValueError, match="PEFT has an adapter for each"):
                save_peft(tmp_path / "no", lora, adapters, names_of(model.params, family, head=False), task_type=None)


def test_all_leaves_have_names(models):
    _, model = models("gpt2")
    assert set(names_of(model.params, "gpt2", head=False)) == set(named_leaves(model.params))
