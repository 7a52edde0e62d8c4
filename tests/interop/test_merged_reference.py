"""Merged folders as transformers loads them: the same logits, ids and chats."""

from __future__ import annotations

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.cli import main
from rslora_jax.interop import merged
from rslora_jax.models.decoder import Decoder

from .runs import make_run
from .test_tokenizer import TEXTS

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("reference")]

CHATML = (
    "{% for m in messages %}<end>{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<end>a\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi  hi 12!"}, {"role": "assistant", "content": "a\n\n1"}]


def load(folder, dtype=torch.float32):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[what], (what, info[what])
    return model.eval()


def logits(model, tokens_BxT):
    with torch.no_grad():
        return model(torch.tensor(tokens_BxT)).logits.float().numpy()


@pytest.mark.parametrize("size", ["5GB", "9KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_adapters(size, tied, tiny, tmp_path):
    if tied:
        del tiny.weights["output.weight"]
    lora, loaded, adapters = make_run(tmp_path / "run", tiny.write(tmp_path / "tiny.gguf"))
    flags = ["--dtype", "float32", "--max-shard-size", size]
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *flags]) == 0
    tokens = np.random.default_rng(1).integers(0, 10, (3, 17))
    model = load(tmp_path / "out")
    want = np.asarray(lora.apply(loaded.variables, adapters, jnp.asarray(tokens)))
    assert np.abs(logits(model, tokens) - want).max() < 1e-4
    base = np.asarray(Decoder(loaded.config).apply(loaded.variables, jnp.asarray(tokens)))
    assert np.abs(want - base).max() > 0.1
    assert model.config.tie_word_embeddings == tied and model.config.torch_dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 1)


@pytest.mark.parametrize("uses", [("lookup",), ("product",), ("lookup", "product")])
def test_adapters_of_one_use_of_a_table_are_merged_into_a_head_of_its_own(uses, tiny, tmp_path, capsys):
    del tiny.weights["output.weight"]
    targets = ["*/up_proj/kernel", *(f"*/embedding@{use}" for use in uses)]
    lora, loaded, adapters = make_run(tmp_path / "run", tiny.write(tmp_path / "tiny.gguf"), targets=targets)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "the model gets a head of its own" in capsys.readouterr().out
    tokens = np.random.default_rng(1).integers(0, 10, (3, 17))
    model = load(tmp_path / "out")
    want = np.asarray(lora.apply(loaded.variables, adapters, jnp.asarray(tokens)))
    np.testing.assert_allclose(logits(model, tokens), want, rtol=0, atol=1e-4)
    assert not model.config.tie_word_embeddings
    table = np.asarray(loaded.variables["params"]["embed"]["embedding"])
    made = {"lookup": model.get_input_embeddings(), "product": model.get_output_embeddings()}
    changed = {use for use, layer in made.items() if not np.array_equal(layer.weight.detach().numpy(), table)}
    assert changed == set(uses)


@pytest.mark.parametrize("add_bos", [False, True])
def test_ids_and_chats_are_those_of_our_tokenizer(add_bos, tiny, tmp_path):
    tiny.metadata |= {"tokenizer.chat_template": CHATML}
    lora, loaded, adapters = make_run(tmp_path / "run", tiny.write(tmp_path / "tiny.gguf"))
    ours = dataclasses.replace(loaded.tokenizer, add_bos=add_bos, bos_id=1)
    merged.write_merged(
        tmp_path / "out", lora, loaded.variables, adapters, config=loaded.config, tokenizer=ours, dtype="bfloat16"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("", "hi", "h i 12 !a", "<end>hi<pad>", "aa h", ours.chat(CHAT)):
        assert theirs(text).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(
            ours.encode(text), skip_special=True
        )
    for ask in (False, True):
        said = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=ask)
        assert said == ours.chat(CHAT, add_generation_prompt=ask)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (0, 1, 1)
    # What a user does: these very arguments go into `generate`, which refuses those it does not know.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generate(**theirs("hi 1", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.nightly
def test_smollm2_merged_gives_the_logits_of_its_adapters(smollm2_path, tmp_path):
    lora, loaded, adapters = make_run(tmp_path / "run", None, size=0.02)
    flags = ["--dtype", "float32", "--max-shard-size", "200MB"]
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *flags]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = loaded.tokenizer
    for text in (*TEXTS, ours.chat(CHAT)):
        assert theirs(text).input_ids == ours.encode(text), repr(text)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == ours.chat(CHAT)
    tokens = [ours.encode(ours.chat(CHAT))]
    want = np.asarray(lora.apply(loaded.variables, adapters, jnp.asarray(tokens)))
    base = np.asarray(Decoder(loaded.config).apply(loaded.variables, jnp.asarray(tokens)))
    found = logits(load(tmp_path / "out"), tokens)
    print(f"largest difference {np.abs(found - want).max():.2e}; the adapters change {np.abs(want - base).max():.2f}")
    # Logits reach 44. Either program is up to 1.4e-4 off its own result in float64, so 1e-4 cannot be asked for.
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max() and np.abs(want - base).max() > 1
