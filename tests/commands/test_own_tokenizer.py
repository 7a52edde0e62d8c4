"""A folder of adapters may bring a tokenizer of its own: every command goes by it, and hands it on."""

from __future__ import annotations

import json
import shutil

import pytest

from rslora_jax.cli import main
from rslora_jax.interop.adapter_folder import load_base, open_adapters, place_of_base
from rslora_jax.interop.huggingface import load_huggingface
from rslora_jax.interop.tokenizer_files import read_tokenizer, tokenizer_files
from rslora_jax.models.decoder import Decoder
from rslora_jax.models.generation import generate
from rslora_jax.train import batches
from tests.interop import folders
from tests.interop.runs import make_run

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% if m.role == 'assistant' %}<pad>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
DIFFERS = "it differs from the base's in the chat template, the eos token ('<pad>' for '<end>')\n"


def with_tokenizer(folder, tokenizer, **changes):
    """Put a tokenizer beside adapters, as unsloth and LLaMA-Factory do: another template, and another eos token."""
    for name, text in tokenizer_files(tokenizer, 128).items():
        (folder / name).write_text(text)
    about = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<pad>"}
    about.pop("chat_template", None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(about | changes))


@pytest.fixture(scope="module")
def peft(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "peft"
    assert main(["export", str(place.folder / "one"), "--out", str(out)]) == 0
    with_tokenizer(out, place.base.tokenizer)
    return out


def by_hand(place, prompt, stops):
    config, variables, tokenizer = place.base
    lora, adapters = place.runs["one"]
    merged, ids = lora.merge(variables, adapters), [tokenizer.encode(prompt)]
    (out,) = generate(Decoder(config).apply, merged, ids, config, max_new=9, eos_id=stops)
    return tokenizer.decode(out, skip_special=True).strip()


ASK = ["--prompt", "hi 1+1=", "--max-new", "9"]


def test_every_command_goes_by_it_and_hands_it_on(place, peft, capsys, tmp_path):
    model = ["--model", str(place.folder / "model.gguf")]
    want = by_hand(place, "[u]hi 1+1=[a]", (0, 1))
    assert want != by_hand(place, "<u>hi 1+1=<a>", (0,))
    assert main(["import", str(peft), *model, "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    for folder in (peft, tmp_path / "run", tmp_path / "run" / "checkpoints" / "0", tmp_path / "again"):
        capsys.readouterr()
        assert main(["generate", str(folder), *model, *ASK]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == want
        assert "has a tokenizer of its own, which is used: " + DIFFERS in err and err.count(DIFFERS) == 1
    for name in ("peft", "run"):
        folder, merged = {"peft": peft}.get(name, tmp_path / name), tmp_path / f"merged-{name}"
        assert main(["merge", str(folder), *model, "--out", str(merged)]) == 0
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (merged / name).read_bytes() == (peft / name).read_bytes()
        assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [1, 0]
        assert read_tokenizer(merged).chat_template == TEMPLATE


@pytest.mark.nightly
def test_training_goes_by_it_and_keeps_it(place, peft, capsys, tmp_path, monkeypatch):
    model, run = ["--model", str(place.folder / "model.gguf")], str(tmp_path / "run")
    few = ["--data", str(place.folder / "sums.jsonl"), "--max-len", "48", "--heldout", "1", "--learning-rate", "1e-30"]
    seen, prepare = [], batches.prepare
    monkeypatch.setattr(
        batches,
        "prepare",
        lambda tokenizer, *args, **more: (seen.append(tokenizer), prepare(tokenizer, *args, **more))[1],
    )
    assert main(["train", "--adapters", str(peft), *model, *few, "--steps", "1", "--out", run]) == 0
    assert main(["train", "--resume", "--out", run, "--steps", "2"]) == 0
    assert {(one.chat_template, one.eos_id, one.stop_ids) for one in seen} == {(TEMPLATE, 1, (1, 0))}
    capsys.readouterr()
    assert main(["generate", run, *ASK]) == 0
    assert capsys.readouterr().out.strip() == by_hand(place, "[u]hi 1+1=[a]", (0, 1))
    # A new run in a folder where one was killed before its first checkpoint does not take what is left of it.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(["train", *model, *few, "--steps", "1", "--out", run]) == 0
    assert not (tmp_path / "run" / "tokenizer").exists() and seen[-1].chat_template != TEMPLATE


def test_merging_into_a_folder_takes_its_files_in_place_of_the_base_s(tmp_path, capsys):
    base = folders.write(tmp_path / "base")
    (base / "chat_template.jinja").write_text("the base's")
    (base / "special_tokens_map.json").write_text('{"unk_token": "<s>"}')
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.5}')
    make_run(tmp_path / "run", base)
    own = tmp_path / "run" / "tokenizer"
    own.mkdir()
    folders.tokenizer_json(own)
    named = {"bos_token": "<s>", "eos_token": "<pad>", "chat_template": folders.TEMPLATE}
    (own / "tokenizer_config.json").write_text(json.dumps(named))
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert "the eos token ('<pad>' for '</s>')" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    said = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert said == {"eos_token_id": [1, 2], "temperature": 0.5}


@pytest.mark.parametrize("said_in", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_and_an_end_alone_are_said_of_the_bases_tokens(tmp_path, capsys, said_in):
    base = folders.write(tmp_path / "base")
    (base / "chat_template.jinja").write_text("the base's")
    make_run(tmp_path / "run", base)
    own = tmp_path / "run" / "tokenizer"
    own.mkdir()
    template = "{{ messages[0].content }}!"
    about = {"eos_token": "<pad>"} | ({"chat_template": template} if said_in == "tokenizer_config.json" else {})
    (own / "tokenizer_config.json").write_text(json.dumps(about))
    if said_in == "chat_template.jinja":
        (own / said_in).write_text(template)
    opened = open_adapters(tmp_path / "run")
    tokenizer = load_base(opened).tokenizer
    assert (tokenizer.chat_template, tokenizer.eos_id, tokenizer.stop_ids) == (template, 2, (2, 1))
    assert "differs from the base's in the chat template, the eos token ('<pad>' for '</s>')" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    merged = load_huggingface(tmp_path / "merged").tokenizer
    assert merged.chat_template == template and merged.eos_id == 2 and set(merged.stop_ids) == {1, 2}
    assert merged.encode("hi") == tokenizer.encode("hi")
    (own / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": "<new>"}))
    with pytest.raises(ValueError, match="ends a text with '<new>', which is no token of the base"):
        load_base(opened)


def test_what_does_not_belong_to_the_model_is_refused(place, peft, capsys, tmp_path):
    model = ["--model", str(place.folder / "model.gguf")]
    other = shutil.copytree(peft, tmp_path / "other")
    with_tokenizer(other, place.base.tokenizer, eos_token="<new>")
    assert main(["generate", str(other), *model, "--prompt", "hi"]) == 2
    assert f"{other} has 260 tokens in tokenizer.json and vocab_size 259" in capsys.readouterr().err
    assert main(["import", str(other), *model, "--out", str(tmp_path / "run")]) == 2
    assert main(["export", str(other), *model, "--out", str(tmp_path / "out")]) == 0  # it needs no text
    assert "without a tokenizer: " in capsys.readouterr().err
    sums = ["--data", str(place.folder / "sums.jsonl")]
    assert main(["eval", str(place.folder / "one"), str(peft), *model, *sums]) == 2
    assert f"{peft} has another tokenizer than {place.folder}/one" in capsys.readouterr().err


def test_weights_alone_need_no_tokenizer(tmp_path, capsys):
    base = folders.write(tmp_path / "base")
    make_run(tmp_path / "run", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    run, out = str(tmp_path / "run"), lambda name: ["--out", str(tmp_path / name)]
    for command in (
        ["export", run, *out("peft")],
        ["inspect", run, *out("seen")],
        ["merge", run, *out("merged")],
        ["import", str(tmp_path / "peft"), "--model", str(base), *out("again")],
    ):
        assert main(command) == 0
        assert capsys.readouterr().err.count("without a tokenizer: ") == 1
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"config.json", "model.safetensors"}
    assert main(["generate", run, "--prompt", "hi"]) == 2
    assert "has no tokenizer.json: save it with transformers'" in capsys.readouterr().err


def test_a_base_that_only_a_peft_folder_names_is_read_when_it_is_asked_for(place, peft, capsys, tmp_path):
    folder = shutil.copytree(peft, tmp_path / "named")

    def name(base, revision=None):
        path = folder / "adapter_config.json"
        about = json.loads(path.read_text()) | {"base_model_name_or_path": base, "revision": revision}
        path.write_text(json.dumps(about))
        return open_adapters(folder)

    model, out = str(place.folder / "model.gguf"), str(tmp_path / "out")
    sums = str(place.folder / "sums.jsonl")
    for base, said in ((model, model), ("owner/model", "owner/model@v2"), ("/a b/model", "'/a b/model'")):
        name(base, "v2")
        for command in (
            ["generate", str(folder), "--prompt", "hi"],
            ["eval", str(folder)],
            ["inspect", str(folder)],
            ["merge", str(folder), "--out", out],
            ["export", str(folder), "--out", out],
            ["import", str(folder), "--out", out],
            ["train", "--adapters", str(folder), "--data", sums, "--out", out],
        ):
            assert main(command) == 2
            err = capsys.readouterr().err
            assert f"as its base, which is read when it is asked for: say --model {said}, or" in err, command
    # Asked for by its name, it is of the revision that the adapters were trained on; another is what it is.
    opened = name("owner/model", "v2")
    assert place_of_base(opened, "owner/model") == "owner/model@v2"
    assert place_of_base(opened, "owner/model@main") == "owner/model@main"
    assert place_of_base(opened, "owner/other") == "owner/other"
    assert place_of_base(name("owner/model"), "owner/model") == "owner/model"
    assert load_base(opened, model).config.max_len == 128


def test_a_revision_is_kept_on_the_way_out(place, tmp_path):
    for given, name, revision in (
        ("owner/model@v2", "owner/model", "v2"),
        ("owner/model", "owner/model", None),
        ("./a@b/c", "./a@b/c", None),
    ):
        out = tmp_path / str(revision) / name.replace("/", "-")
        assert main(["export", str(place.folder / "one"), "--base-model", given, "--out", str(out)]) == 0
        about = json.loads((out / "adapter_config.json").read_text())
        assert (about["base_model_name_or_path"], about["revision"]) == (name, revision)
