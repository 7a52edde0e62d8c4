"""Folders that transformers and bitsandbytes wrote, against their own numbers and logits."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rslora_jax as rslora
from rslora_jax.interop import load_model
from rslora_jax.interop.peft import load_peft, read_config
from rslora_jax.sites import named_leaves
from rslora_jax.stored import is_stored

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.nightly,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.by_day_on("oldest"),
]

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, head_dim=16)
MODELS = {"Llama": {}, "Qwen2": {"tie_word_embeddings": True}, "Qwen3": {}, "Gemma": {}}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMS = {
    "nf4 double": FOUR | {"bnb_4bit_use_double_quant": True},
    "nf4": FOUR,
    "fp4": FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "skipped": FOUR | {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]},
    "stored as float32": FOUR | {"bnb_4bit_quant_storage": "float32"},
}
PARTS = {"self_attn": "attn", "mlp": "mlp"}
BY_DAY = [("Llama", "nf4 double"), ("Qwen2", "int8")]
CASES = [
    pytest.param(model, form, marks=[] if (model, form) in BY_DAY else pytest.mark.nightly)
    for model in MODELS
    for form in FORMS
]


def made(folder, name, form, **sizes):
    """Save a model of random weights, and again as bitsandbytes has it; return it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name] | sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    how = transformers.BitsAndBytesConfig(**FORMS[form])
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = load(folder / "dense", quantization_config=how, dtype=torch.float32)
    found.save_pretrained(folder / "few")
    return load(folder / "few", dtype=torch.float32)


def numbers(module):
    """Return what a layer of bitsandbytes multiplies by, by its own arithmetic."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).numpy()
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).numpy()


@pytest.mark.filterwarnings("ignore:.*is held as array", "ignore:.*are held as arrays", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_folder_holds_the_librarys_numbers_and_gives_its_logits(tmp_path, name, form):
    theirs = made(tmp_path, name, form)
    model = load_model(tmp_path / "few", scan_layers=False, text=False)
    leaves, count = named_leaves(model.variables), 0
    for path, module in theirs.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            _, _, layer, part, own = path.split(".")
            leaf = leaves[f"params/layers_{layer}/{PARTS[part]}/{own}/kernel"]
            assert is_stored(leaf)
            ours, want = np.asarray(leaf.dense()).T, numbers(module)
            if form == "int8":  # which is scaled by SCB, then divided by 127: two roundings, in another order
                np.testing.assert_allclose(ours, want, rtol=3e-7)
            else:
                np.testing.assert_array_equal(ours, want)
            # Its own products on CPUs round data too, or lay weights out anew.
            module.forward = functools.partial(torch.nn.functional.linear, weight=torch.tensor(want), bias=module.bias)
            count += 1
    assert count == (11 if form == "skipped" else 14)
    tokens = np.arange(24).reshape(2, 12) * 7 % 96
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    scanned = load_model(tmp_path / "few", text=False)
    for one in (model, scanned):
        got = np.asarray(jax.jit(one.apply)(one.variables, jnp.asarray(tokens)))
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_logits_are_those_of_the_librarys_own_products(tmp_path):
    theirs = made(tmp_path, "Llama", "nf4 double").train()  # in training it multiplies by the dequantised weight
    tokens = np.arange(24).reshape(2, 12) * 7 % 96
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    model = load_model(tmp_path / "few", text=False)
    got = np.asarray(jax.jit(model.apply)(model.variables, jnp.asarray(tokens)))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


STEPS, RATE = 5, 3e-3
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def their_losses(theirs, tokens):
    """Train PEFT's adapters over the library's own products and return the mean loss of each step."""
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01)
    losses = []
    for _ in range(STEPS):
        loss = theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def our_losses(folder, adapter, tokens):
    """Train the same adapters over the same folder, packed, and return the mean loss of each step."""
    model = load_model(folder, text=False)
    config = read_config(adapter, model.variables)
    lora = rslora.wrap(model.apply, model.variables, tokens, config=config)
    adapters, replaced = load_peft(adapter, lora)
    packed = [is_stored(leaf) for path, leaf in named_leaves(model.variables).items() if path in lora.sites]
    assert not replaced and packed == 7 * [True]

    def loss(adapters, params):
        logits = lora.apply(params, adapters, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    optimizer = optax.adamw(RATE, weight_decay=0.01)
    state, losses = optimizer.init(adapters), []
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(STEPS):
        value, gradients = step(adapters, model.variables)
        losses.append(float(value))
        updates, state = optimizer.update(gradients, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return losses


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_five_steps_have_the_losses_of_peft_over_bitsandbytes(tmp_path, name):
    base = made(tmp_path, name, "nf4 double")
    torch.manual_seed(0)
    settings = dict(r=6, lora_alpha=9, use_rslora=True, target_modules=ADAPTED, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).train()
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, 96, (4, 24))
    want = their_losses(theirs, tokens)
    assert want[-1] < want[0] - 0.01
    # Over the weights before rounding the losses are 5e-4 of them away.
    np.testing.assert_allclose(our_losses(tmp_path / "few", tmp_path / "adapter", tokens), want, rtol=1e-5)
