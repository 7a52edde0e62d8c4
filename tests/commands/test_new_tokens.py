"""`rslora train --new-tokens`: tokens, rows and tokenizer go with the run through every command."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.cli import main
from rslora_jax.commands import runs
from rslora_jax.commands.new_tokens import tokens_of
from rslora_jax.interop.adapter_folder import attach, load_base, open_adapters
from rslora_jax.interop.enlarged import of_file, with_tokens
from rslora_jax.interop.huggingface import load_huggingface
from rslora_jax.interop.load import load_model
from rslora_jax.store import checkpoint
from rslora_jax.store.checksum import checksums
from tests.interop import folders

pytestmark = pytest.mark.usefixtures("compile_fast")
NEW = ("<tool>", "</tool>")
# Of the folder's tokenizer the tokens are fewer than the rows, or as many, and table and head are two weights or one.
BASES = {"padded": {}, "whole": {"vocab_size": 16}, "tied": {"vocab_size": 16, "tie_word_embeddings": True}}


@pytest.mark.by_day_on("newest")
@pytest.mark.parametrize("name", BASES)
def test_rows_are_the_mean_and_the_base_is_still_the_base(name, tmp_path):
    model = load_huggingface(folders.write(tmp_path / "base", BASES[name]), scan_layers=True)
    found, rows = with_tokens(model, NEW)
    _, *ids = found.tokenizer.encode("hi<tool>hi</tool>")  # behind the bos token
    assert found.tokenizer.decode(ids) == "hi<tool>hi</tool>" and len(ids) == 4
    new, paths = (ids[1], ids[3]), {"params/embed/embedding"} | ({"params/lm_head/kernel"} if name != "tied" else set())
    assert rows == dict.fromkeys(paths, new) and model.tokenizer.encode("<tool>") != [new[0]]
    assert checksums(of_file(found)) == checksums(model.variables)
    assert found.config.vocab_size == max(model.config.vocab_size, new[1] + 1)
    table, old = (np.asarray(m.variables["params"]["embed"]["embedding"]) for m in (found, model))
    np.testing.assert_array_equal(table[: len(old)], old)
    if name != "padded":
        assert found.changed == {"vocab_size": 18}
        np.testing.assert_allclose(table[16:], np.repeat(old.mean(0, keepdims=True), 2, 0), atol=1e-6)
    logits, before = (np.asarray(m.apply(m.variables, jnp.asarray([[3, 4, 5]]))) for m in (found, model))
    np.testing.assert_allclose(logits[..., : len(old)], before, atol=1e-6)


def test_a_token_that_is_there_is_said(tmp_path):
    model = load_huggingface(folders.write(tmp_path / "base"), scan_layers=True)
    for texts, said in (
        (["hi"], "'hi' is a token of this model already, 5: leave it out of the new ones"),
        (["<a>", "<a>"], "one that is empty or there twice"),
        (["<a>", ""], "one that is empty or there twice"),
    ):
        with pytest.raises(ValueError, match=said):
            with_tokens(model, texts)


def test_tokens_stand_between_commas_or_in_quotes():
    for text, want in {
        "<a>": ["<a>"],
        " <a> , b c ,d": ["<a>", "b c", "d"],
        '"a,b"," c ",say "hi"': ["a,b", " c ", 'say "hi"'],
        '"say ""hi"", "': ['say "hi", '],
        '"a"b,"c': ['"a"b', '"c'],
        "<a>,,<b>": ["<a>", "", "<b>"],
        "日本, </é>": ["日本", "</é>"],
    }.items():
        assert tokens_of(text) == want


@pytest.fixture(scope="module", params=BASES)
def run(request, tmp_path_factory):
    """A run of a few steps on calls of a tool, and the model that it is on."""
    folder = tmp_path_factory.mktemp("new")
    base = folders.write(folder / "base", BASES[request.param])
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (base / "tokenizer_config.json").write_text(json.dumps(named))
    rows = [{"text": f"hi<tool>{'1' * (n % 3 + 1)}</tool>"} for n in range(20)]
    (folder / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--out", str(folder / "run"), "--learning-rate", "0.05"]
    flags = ["--data", str(folder / "calls.jsonl"), "--rank", "3", "--alpha", "7", "--max-len", "16", "--heldout", "2"]
    start = ["train", "--model", str(base), *flags, *out, "--new-tokens", "<tool>, </tool>"]
    assert main([*start, "--steps", "2"]) == 0
    assert main(["train", "--resume", "--out", str(folder / "run"), "--steps", "4"]) == 0
    return folder


@pytest.mark.nightly
def test_a_run_keeps_tokens_rows_and_the_name_of_its_base(run, capsys):
    opened = open_adapters(run / "run")
    model = load_huggingface(run / "base", scan_layers=True)
    assert opened.base == checksums(model.variables) and opened.settings["new_tokens"] == "<tool>, </tool>"
    found = attach(opened, load_base(opened))
    assert found.model.tokenizer.encode("<tool></tool>") == [0, *opened.config.trained_rows[0][1]]
    fresh = found.lora.init(jax.random.key(0), found.variables)
    for path in (path for path, _ in opened.config.trained_rows):
        assert np.abs(found.adapters[path]["rows"] - fresh[path]["rows"]).max() > 0.01
    assert main(["generate", str(run / "run"), "--prompt", "hi", "--plain", "--max-new", "6"]) == 0
    ours = capsys.readouterr().out
    assert main(["generate", str(run / "run"), "--prompt", "hi", "--plain", "--max-new", "6", "--merged"]) == 0
    assert capsys.readouterr().out == ours
    assert main(["eval", str(run / "run"), "--json", str(run / "scores.json")]) == 0
    base, after = json.loads((run / "scores.json").read_text())["models"]
    assert after["loss"] < base["loss"] and np.isfinite(base["loss"])
    assert main(["train", "--resume", "--out", str(run / "run"), "--steps", "6", "--new-tokens", "<b>"]) == 2
    assert "--new-tokens <b> here, <tool>, </tool> was saved: leave it out" in capsys.readouterr().err
    again = ["train", "--adapters", str(run / "run"), "--data", str(run / "calls.jsonl"), "--model", str(run / "base")]
    assert main([*again, "--steps", "1", "--max-len", "16", "--out", str(run / "second")]) == 0
    assert open_adapters(run / "second").config.trained_rows == opened.config.trained_rows
    assert main(["generate", str(run / "second"), "--prompt", "hi<tool>", "--plain", "--max-new", "3"]) == 0
    assert main(["inspect", str(run / "run")]) == 0


@pytest.mark.nightly
@pytest.mark.reference
def test_transformers_and_peft_have_them_too(run, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    text, plain, few = "hi<tool>1</tool>hi", {"skip_special_tokens": False}, ["--max-new", "3"]
    loaded = runs.load_runs([str(run / "run")])
    (one,) = loaded.runs
    ids = loaded.tokenizer.encode(text)
    want = np.asarray(one.lora.apply(one.variables, one.adapters, jnp.asarray([ids])))

    def logits(model):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.numpy()

    assert main(["merge", str(run / "run"), "--out", str(run / "merged"), "--dtype", "float32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    assert theirs.config.vocab_size == loaded.config.vocab_size == len(theirs.get_input_embeddings().weight)
    assert tokenizer(text).input_ids == ids and tokenizer.decode(ids[1:], **plain) == text
    np.testing.assert_allclose(logits(theirs), want, atol=1e-4)
    assert load_model(run / "merged").tokenizer.encode(text) == ids

    capsys.readouterr()
    assert main(["export", str(run / "run"), "--out", str(run / "peft")]) == 0
    said = f"base.resize_token_embeddings({loaded.config.vocab_size})" in capsys.readouterr().out
    assert said == (loaded.config.vocab_size == 18)
    base = transformers.AutoModelForCausalLM.from_pretrained(run / "base").eval()
    if loaded.config.vocab_size > base.config.vocab_size:
        base.resize_token_embeddings(loaded.config.vocab_size)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), run / "peft").eval()
    np.testing.assert_allclose(logits(adapted), want, atol=1e-4)
    adapted.save_pretrained(run / "again")  # with the table, where it was resized
    assert main(["generate", str(run / "peft"), "--model", str(run / "base"), "--prompt", "hi", "--plain", *few]) == 0
    back = open_adapters(run / "again")
    found = attach(back, load_base(back, run / "base", text=False))
    got = np.asarray(found.lora.apply(found.variables, found.adapters, jnp.asarray([ids])))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert main(["export", str(run / "run"), "--out", str(run / "vllm"), "--for", "vllm"]) == 2
    assert "serves no weight of which rows are trained" in capsys.readouterr().err
    assert main(["import", str(run / "peft"), "--model", str(run / "base"), "--out", str(run / "imported")]) == 0
    assert checkpoint.load_about(run / "imported")["base"] == open_adapters(run / "run").base
