"""Adapters that PEFT made, here; and adapters made here, in PEFT: the same logits from the same base."""

from __future__ import annotations

import copy
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors

import rslora_jax as rslora
from rslora_jax.interop.decoder import DECODER
from rslora_jax.interop.names import places
from rslora_jax.interop.peft import check_vllm, load_peft, read_config, replace, save_peft
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.sites import named_leaves, path_name

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
]

VOCABULARY, LAYERS = 37, 3
TOKENS = np.array([[5, 1, 30, 36, 2], [7, 7, 0, 11, 12]], np.int32)


@pytest.fixture(scope="module")
def bases():
    """Give transformers' models, with a head of their own and with the token table as head."""

    def make(tied):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            attn_implementation="eager",
        )
        return transformers.LlamaForCausalLM(config).eval()

    return {tied: make(tied) for tied in (False, True)}


def ours(base, scan):
    """Give (apply, variables) of our model with the weights of transformers'."""
    c = base.config
    config = DecoderConfig(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        mlp_width=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        rope_base=c.rope_theta,
        norm_eps=c.rms_norm_eps,
        tie_head=c.tie_word_embeddings,
        scan_layers=scan,
    )
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in named_leaves(shapes).items()}
    state = base.state_dict()
    for name, place in places(DECODER.names, {path: leaf.shape for path, leaf in flat.items()}).items():
        weight = state[name].numpy()
        weight = weight.T if place.path.endswith("kernel") else weight
        flat[place.path][... if place.layer is None else place.layer] = weight
    return model.apply, jax.tree_util.tree_map_with_path(lambda path, _: jnp.array(flat[path_name(path)]), shapes)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def shake(model):
    """Give every trained number a value; PEFT's fresh B is zero, which would hide it."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def wrapped(apply, variables, config):
    return rslora.wrap(apply, variables, TOKENS, config=config)


def layouts(case):
    """Stacked layers are where it is hard; where names are resolved one by one, looped ones too."""
    return (True, False) if case in ("patterns", "layers", "saved", "saved layer", "tied") else (True,)


def run(lora, *args):
    return np.asarray(jax.jit(lora.apply)(*args, TOKENS))


def random_adapters(lora, seed=0, params=None):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.array(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, lora.init(jax.random.key(0), params))


def by_day(cases, *chosen):
    """Leave the other cases to the night."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.nightly) for case in cases]


REGEX = r"model\.layers\.[02]\.(self_attn\.[qv]_proj|mlp\.down_proj)"
FROM_PEFT = {
    "lora": dict(r=6, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "rslora": dict(r=6, lora_alpha=16, use_rslora=True, target_modules="all-linear"),
    "patterns": dict(
        r=6,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"q_proj": 3, r"^model\.layers\.1\.mlp\.up_proj": 11, "layers.[12].mlp.up_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 5, "k_proj": 7.5},
    ),
    "patterns of lora": dict(
        r=6,
        lora_alpha=16,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"layers.2.self_attn.q_proj": 10},
        alpha_pattern={"1.self_attn.[a-z]_proj": 3},
    ),
    "regex": dict(r=5, lora_alpha=12, use_rslora=True, target_modules=REGEX),
    "layers": dict(
        r=5, lora_alpha=12, target_modules=["q_proj", "gate_proj"], layers_to_transform=[1], layers_pattern="layers"
    ),
    "dora layers": dict(
        r=5,
        lora_alpha=12,
        use_rslora=True,
        use_dora=True,
        target_modules=["q_proj", "gate_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"layers.2.self_attn.q_proj": 3},
    ),
    "exclude": dict(
        r=5, lora_alpha=12, target_modules=["q_proj", "gate_proj"], exclude_modules=["layers.0.mlp.gate_proj"]
    ),
    "embeddings": dict(r=5, lora_alpha=12, use_rslora=True, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "tied": dict(r=5, lora_alpha=12, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "tied: look-up": dict(r=5, lora_alpha=12, target_modules=["embed_tokens", "q_proj"]),
    "tied: head": dict(r=5, lora_alpha=12, use_rslora=True, target_modules=["lm_head", "q_proj"]),
    "tied: each": dict(
        r=5,
        lora_alpha=12,
        use_rslora=True,
        target_modules=["embed_tokens", "lm_head"],
        rank_pattern={"lm_head": 3},
        alpha_pattern={"embed_tokens": 4},
    ),
    "dora": dict(
        r=6,
        lora_alpha=16,
        use_rslora=True,
        use_dora=True,
        lora_dropout=0.1,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"down_proj": 5},
    ),
    "dora table": dict(r=5, lora_alpha=12, use_dora=True, target_modules=["embed_tokens", "lm_head"]),
    "tied: dora": dict(r=5, lora_alpha=12, use_dora=True, target_modules=["lm_head", "q_proj"]),
    "tied: saved": dict(
        r=5, lora_alpha=12, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "saved layer": dict(
        r=5, lora_alpha=12, target_modules=["q_proj"], modules_to_save=["layers.1.mlp.down_proj", "layers.2.self_attn"]
    ),
    "saved": dict(r=5, lora_alpha=12, target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "up_proj"]),
}


USES = {
    "tied: look-up": {"lookup"},
    "tied: head": {"product"},
    "tied: dora": {"product"},
    "tied: each": {"lookup", "product"},
}
DAY = ("rslora", "patterns", "dora layers", "embeddings", "saved", "tied: each", "dora")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", by_day(FROM_PEFT, *DAY))
def test_an_adapter_from_peft_gives_its_logits(case, bases, tmp_path):
    base = bases[case.startswith("tied")]
    torch.manual_seed(0)  # of the fresh A, whatever ran before: some make float32's rounding 1e-4, in torch too
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **FROM_PEFT[case]))
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    want, plain = logits(theirs.eval()), logits(base)
    assert np.abs(want - plain).max() > 0.1
    for scan in layouts(case):
        apply, variables = ours(base, scan)
        config = read_config(tmp_path / "theirs", variables)
        lora = wrapped(apply, variables, config)
        assert lora.config.dropout == FROM_PEFT[case].get("lora_dropout", 0)
        adapters, replaced = load_peft(tmp_path / "theirs", lora)
        part = case == "saved layer" and scan  # of a stack: that is put into the base, and what is whole is trained
        assert bool(set(replaced) - {"params/embed/embedding", "params/lm_head/kernel"}) == part
        whole = {path for path, site in lora.sites.items() if site.kind == "trained"}
        assert bool(whole) == (case in ("tied: saved", "saved") or (case == "saved layer" and not scan))
        assert {site.use for site in lora.sites.values()} - {""} == USES.get(case, set())
        changed = replace(variables, replaced)
        np.testing.assert_allclose(run(lora, changed, adapters), want, rtol=0, atol=1e-4)

        save_peft(tmp_path / f"again-{scan}", lora, adapters, replaced=replaced)
        same_factors(tmp_path / "theirs", tmp_path / f"again-{scan}")
        config_2 = read_config(tmp_path / f"again-{scan}", variables)
        lora_2 = wrapped(apply, variables, config_2)
        back, replaced_2 = load_peft(tmp_path / f"again-{scan}", lora_2)
        assert lora.sites == lora_2.sites
        jax.tree.map(np.testing.assert_array_equal, (back, replaced_2), (adapters, replaced))


def same_factors(theirs, ours):
    """Compare two folders: the numbers of a layer are its own whatever others have, and so bit for bit the same."""
    one, other = (safetensors.load_file(folder / "adapter_model.safetensors") for folder in (theirs, ours))
    factors = {name for name in one if ".lora_" in name}
    assert factors <= {*other}
    for name in factors:
        np.testing.assert_array_equal(one[name], other[name], name)


def loaded(base, folder):
    """Load with PEFT; what it would only warn of is an error."""
    base = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # meant, where one use is adapted
        return peft.PeftModel.from_pretrained(base, folder).eval()


ALL = "*/{q,k,v,o,gate,up,down}_proj/kernel"
TO_PEFT = {
    "rslora": dict(rank=6, alpha=16),
    "lora": dict(rank=6, alpha=16, scaling="lora"),
    "constant": dict(rank=6, alpha=1.5, scaling="constant", rank_pattern={"*/mlp/*": 3}),
    "function": dict(rank=6, alpha=1.5, scaling=lambda rank: rank**-0.25),
    "patterns": dict(
        rank=6, alpha=16, rank_pattern={"*/mlp/*": 13, "*/q_proj/*": 2}, alpha_pattern={"*/{q,up}_proj/*": 5.5}
    ),
    "embeddings": dict(rank=5, alpha=12, targets=["*/embedding", "*lm_head*", "*/q_proj/*"], alpha_pattern={"*/e*": 3}),
    "tied": dict(rank=5, alpha=12, targets=["*/embedding", "*/q_proj/*"]),
    "trained": dict(rank=5, alpha=12, targets="*/q_proj/*", trained=["*/attn_norm/scale", "*/embedding", "*lm_head*"]),
    "tied: trained": dict(rank=5, alpha=12, targets="*/q_proj/*", trained=["*/embedding", "params/norm/scale"]),
    "dora": dict(rank=6, alpha=16, method="dora", dropout=0.2, rank_pattern={"*/mlp/*": 3}),
    "layers": dict(
        rank=6, alpha=16, targets=["*/layers_{0,2}/*/{q,k}_proj/*", "*/v_proj/*"], exclude="*/layers_{0}/*/k_proj/*"
    )
    | dict(rank_pattern={"*/layers_{2}/*": 11, "*/v_proj/*": 4}, alpha_pattern={"*/layers_{1..2}/*": 5.5}),
    "tied: look-up": dict(rank=5, alpha=12, targets=["*/embedding@lookup", "*/q_proj/*"]),
    "tied: head": dict(rank=5, alpha=12, targets=["*/embedding@product"]),
    "tied: each": dict(rank=5, alpha=12, targets=["*/embedding@lookup", "*/embedding@product"])
    | dict(rank_pattern={"*@lookup": 3}),
}


@pytest.mark.parametrize("case", by_day(TO_PEFT, "constant", "layers", "tied"))
def test_an_adapter_from_here_gives_its_logits_in_peft(case, bases, tmp_path):
    base = bases[case.startswith("tied")]
    for scan in layouts(case):
        apply, variables = ours(base, scan)
        lora = wrapped(apply, variables, rslora.LoraConfig(**TO_PEFT[case]))
        adapters = random_adapters(lora, params=variables)
        want = run(lora, variables, adapters)
        assert np.abs(want - logits(base)).max() > 0.1
        save_peft(tmp_path / f"peft-{scan}", lora, adapters)
        np.testing.assert_allclose(logits(loaded(base, tmp_path / f"peft-{scan}")), want, rtol=0, atol=1e-4)
        save_peft(tmp_path / f"plain-{scan}", lora, adapters, use_rslora=False)
        plain = loaded(base, tmp_path / f"plain-{scan}")
        assert not plain.peft_config["default"].use_rslora
        np.testing.assert_allclose(logits(plain), want, rtol=0, atol=1e-4)
        back = wrapped(apply, variables, read_config(tmp_path / f"peft-{scan}", variables))
        if lora.config.scaling in ("rslora", "lora") and not any(site.layers for site in lora.sites.values()):
            got = load_peft(tmp_path / f"peft-{scan}", back)
            jax.tree.map(np.testing.assert_array_equal, tuple(got), (dict(adapters), {}))
        if "trained" in case:
            with pytest.raises(ValueError, match="vLLM serves no weight that is trained whole"):
                save_peft(tmp_path / f"vllm-{scan}", lora, adapters, server="vllm")
            continue
        if case == "dora":
            with pytest.raises(ValueError, match="vLLM serves no DoRA"):
                save_peft(tmp_path / f"vllm-{scan}", lora, adapters, server="vllm")
            continue
        if case.startswith("tied"):
            with pytest.raises(ValueError, match="is also the head"):
                save_peft(tmp_path / f"vllm-{scan}", lora, adapters, server="vllm")
            continue
        save_peft(tmp_path / f"vllm-{scan}", lora, adapters, server="vllm")
        assert check_vllm(tmp_path / f"vllm-{scan}") == (16 if case in ("patterns", "layers") else 8)
        np.testing.assert_allclose(logits(loaded(base, tmp_path / f"vllm-{scan}")), want, rtol=0, atol=1e-4)


def test_some_layers_of_a_looped_model_are_named_one_by_one(bases, tmp_path):
    apply, variables = ours(bases[False], False)
    lora = wrapped(apply, variables, rslora.LoraConfig(rank=5, alpha=12, targets="*/layers_[02]/*/{q,up}_proj/kernel"))
    adapters = random_adapters(lora)
    save_peft(tmp_path / "out", lora, adapters)
    want = run(lora, variables, adapters)
    np.testing.assert_allclose(logits(loaded(bases[False], tmp_path / "out")), want, rtol=0, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["embed_tokens"], []])
def test_a_table_that_was_resized_is_read_by_its_three_names(tied, saved, bases, tmp_path):
    base = copy.deepcopy(bases[tied])
    base.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    base.resize_token_embeddings(VOCABULARY + 3)
    config = peft.LoraConfig(r=5, lora_alpha=12, target_modules=["q_proj"], modules_to_save=saved or None)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    names = set(peft.utils.load_peft_weights(str(tmp_path / "theirs"), device="cpu"))
    assert sum("embed_tokens" in name for name in names) == (3 if saved else 1)
    apply, variables = ours(base, True)
    lora = wrapped(apply, variables, read_config(tmp_path / "theirs", variables))
    adapters, replaced = load_peft(tmp_path / "theirs", lora)
    if tied and saved:  # one of the two, or each for itself
        assert set(replaced) == {"params/embed/embedding@lookup", "params/embed/embedding@product"}
        with pytest.raises(ValueError, match=r"another weight for the (lookup|product) of params/embed"):
            replace(variables, replaced)
    else:
        got = run(lora, replace(variables, replaced), adapters)
        np.testing.assert_allclose(got, logits(theirs.eval()), rtol=0, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_read_beside_the_table_that_was_resized(tied, bases, tmp_path):
    base = copy.deepcopy(bases[tied])
    base.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    base.resize_token_embeddings(VOCABULARY + 3)
    new = [VOCABULARY, VOCABULARY + 2]
    rows = {"embed_tokens": new} | ({} if tied else {"lm_head": new})
    config = peft.LoraConfig(
        r=5, lora_alpha=12, use_rslora=True, target_modules=["q_proj"], trainable_token_indices=rows
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    apply, variables = ours(base, True)
    lora = wrapped(apply, variables, read_config(tmp_path / "theirs", variables))
    adapters, replaced = load_peft(tmp_path / "theirs", lora)
    assert adapters["params/embed/embedding"]["rows"].shape == (2, 24)
    tokens = np.concatenate([TOKENS, [[5, *new, 3, 1]]])
    got = np.asarray(lora.apply(replace(variables, replaced), adapters, tokens))
    np.testing.assert_allclose(got, logits(theirs.eval(), tokens), rtol=0, atol=1e-4)
