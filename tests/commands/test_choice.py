"""`rslora generate --adapters`: each prompt by its own adapter, as that adapter alone answers it."""

import dataclasses
import io
import json
import sys

import jax
import pytest
from safetensors.numpy import load_file, save_file

import rslora_jax as rslora
from rslora_jax.cli import main
from rslora_jax.commands.choice import folders_by_name

from .conftest import save_run
from .test_generate import by_hand

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("oldest")]
NEW = ["--max-new", "9"]
APART = {  # single layers of a rank and scale of their own, and a parameter that is trained whole
    "rank": 2,
    "alpha": 5,
    "scaling": "lora",
    "targets": ["*/layers/{1}/attn/q_proj/kernel", "*/down_proj/kernel"],
    "rank_pattern": {"*/layers/{0}/mlp/*": 4},
    "trained": "params/norm/scale",
}


def answered(capsys, *arguments):
    assert main(["generate", *map(str, arguments), *NEW]) == 0
    return capsys.readouterr()


@pytest.fixture
def compiled():
    """The names of what JAX's backend has compiled."""
    events = []

    def listen(name, _, **more):
        if name.endswith("backend_compile_duration"):
            events.append(more.get("fun_name", name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def adapters_of(place, *more):
    return ",".join([*(str(place.folder / name) for name in ("one", "two", "wide")), *map(str, more)])


def test_each_prompt_is_answered_by_the_adapter_that_it_names_within_one_batch(place, capsys, tmp_path):
    assert main(["export", str(place.folder / "wide"), "--out", str(tmp_path / "peft")]) == 0
    model = place.folder / "model.gguf"
    own = save_run(tmp_path / "apart", place.base, rslora.LoraConfig(**APART), 7, {"model": str(model)})
    place = dataclasses.replace(place, runs=place.runs | {"apart": own})
    names = ["two", "wide", None, "base", "one", "theirs", "apart", "two"]
    lines = [{"prompt": f"{n}+{n}="} | ({} if name is None else {"adapter": name}) for n, name in enumerate(names)]
    lines += [{"prompt": "hi", "adapter": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [
        "--adapters",
        adapters_of(place, f"theirs={tmp_path / 'peft'}", tmp_path / "apart"),
        "--prompts",
        tmp_path / "p.jsonl",
    ]
    flags += ["--adapter", "wide", "--batch-size", 5, "--out", tmp_path / "out.jsonl"]
    shown = answered(capsys, *flags, "--model", model).out
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by = [name or "wide" for name in names] + ["base"]
    assert [record["adapter"] for record in records] == by
    runs = {"base": None, "theirs": "wide"}
    want = [by_hand(place, f"<u>{line['prompt']}<a>", runs.get(n, n)) for line, n in zip(lines, by, strict=True)]
    assert [record["completion"] for record in records] == want and len({*want}) > 4
    assert "> [theirs] 5+5=\n" in shown


def test_another_adapter_compiles_nothing(place, capsys, monkeypatch, compiled):
    """Neither for another line of the input, nor for another batch."""
    numbers, counts = {"a": 0, "b": 2, "c": -1}, []

    def lines():
        for line in numbers:
            before = len(compiled)
            yield line
            counts.append(len(compiled) - before)

    source = lines()
    monkeypatch.setattr("rslora_jax.commands.choice.Choice.number", lambda self, asked: numbers.get(asked.prompt, 0))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(source, ""))
    out = answered(capsys, "--adapters", adapters_of(place)).out
    runs = {"a": "one", "b": "wide", "c": None}
    assert out.strip() == "\n".join(by_hand(place, f"<u>{line}<a>", run) for line, run in runs.items()).strip()
    assert counts[0] > 0 and counts[1:] == [0, 0], compiled
    before = len(compiled)
    prompts = [part for line in ("a", "b", "c", "b", "c", "a") for part in ("--prompt", line)]
    answered(capsys, "--adapters", adapters_of(place), "--batch-size", 2, *prompts)
    of_two = compiled[before:]
    assert sum("_read" in name for name in of_two) == sum("_advance" in name for name in of_two) == 1, of_two


def test_the_first_answers_prompts_that_name_none(place, capsys):
    out = answered(capsys, "--adapters", adapters_of(place), "--prompt", "hi").out
    assert out.strip() == by_hand(place, "<u>hi<a>", "one")


def test_names_of_folders():
    assert folders_by_name("a/one, x = b/one/checkpoints/4,b/two/checkpoints/7 ") == {
        "one": "a/one",
        "x": "b/one/checkpoints/4",
        "two": "b/two/checkpoints/7",
    }
    assert folders_by_name("runs/lr=0.1") == {"lr=0.1": "runs/lr=0.1"}


REFUSED = {
    "names an adapter 'widde' that --adapters does not have: did you mean wide?": ["--prompts", "p.jsonl"],
    "--adapter names an adapter 'qqq' that --adapters does not have: there are one, two, wide and base": [
        *("--adapter", "qqq"),
    ],
    'has "adapter" that is no text': ["--prompts", "number.jsonl"],
    "--adapters is in place of a folder: leave out one": ["one"],
    "--merged makes one model": ["--merged"],
    "has an empty part": ["--adapters", "one,,two"],
    "--adapters  has an empty part": ["--adapters", ""],
    "'TWO' that --adapters does not have: did you mean two?": ["--adapter", "TWO"],
    "p.txt holds no prompt: write one a line": ["--prompts", "p.txt"],
    "base is the name of no adapter at all": ["--adapters", "base=one"],
    "one and two are both named x": ["--adapters", "x=one,x=two"],
    "nowhere is not a folder": ["--adapters", "one,nowhere"],
}


@pytest.mark.parametrize("said", list(REFUSED))
def test_what_cannot_be_is_one_sentence(said, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place.folder)
    (place.folder / "p.jsonl").write_text('{"prompt": "hi", "adapter": "widde"}')
    (place.folder / "p.txt").write_text("\n \n")
    (place.folder / "number.jsonl").write_text('{"prompt": "hi", "adapter": 3}')
    assert main(["generate", "--prompt", "hi", "--adapters", "one,two,wide", *REFUSED[said]]) == 2
    err = capsys.readouterr().err
    assert said in err and err.splitlines()[-1].startswith("rslora: error: "), err


def test_adapter_without_adapters_is_said(place, capsys, tmp_path):
    assert main(["generate", str(place.folder / "one"), "--adapter", "one", "--prompt", "hi"]) == 2
    assert "--adapter names one of --adapters" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi", "adapter": "one"}')
    assert "not looked at without" in answered(capsys, place.folder / "one", "--prompts", tmp_path / "p.jsonl").err


def test_adapters_that_bring_weights_or_name_other_bases_are_refused(place, capsys, tmp_path):
    one, model = str(place.folder / "one"), ["--model", str(place.folder / "model.gguf"), "--prompt", "hi"]
    for name in ("a", "b"):
        assert main(["export", one, "--base-model", f"me/{name}", "--out", str(tmp_path / name)]) == 0
    assert main(["generate", "--adapters", f"{tmp_path / 'a'},{tmp_path / 'b'}", *model]) == 2
    assert "is of another base than" in capsys.readouterr().err
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"modules_to_save": ["model.norm"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    norm = 1 + place.base.variables["params"]["norm"]["scale"]
    tensors |= {"base_model.model.model.norm.weight": jax.device_get(norm)}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    # What it trains whole is its own; what it puts into the base would be that of all.
    assert main(["generate", "--adapters", f"{one},{tmp_path / 'a'}", *model, "--max-new", "3"]) == 0
    table = 1 + place.base.variables["params"]["embed"]["embedding"]
    tensors |= {"base_model.model.model.embed_tokens.weight": jax.device_get(table)}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    assert main(["generate", "--adapters", f"{one},{tmp_path / 'a'}", *model]) == 2
    assert "a replaces weights of the base" in capsys.readouterr().err


def test_a_folder_of_one_call_is_read_by_the_commands(place, capsys, tmp_path):
    lora, adapters = place.runs["one"]
    folder = tmp_path / "mine"
    rslora.save(folder, lora, adapters, params=place.base.variables, model=str(place.folder / "model.gguf"))
    with pytest.raises(ValueError, match="one holds a run of training"):
        rslora.save(place.folder / "one", lora, adapters)
    assert main(["train", "--resume", "--out", str(folder), "--steps", "9"]) == 2
    assert "has no training to resume" in capsys.readouterr().err
    said = []
    for run in (folder, place.folder / "one"):
        assert main(["generate", str(run), "--prompt", "hi", "--max-new", "9"]) == 0
        said.append(capsys.readouterr().out)
        assert main(["inspect", str(run)]) == 0
        assert main(["export", str(run), "--out", str(tmp_path / f"peft-{run.name}")]) == 0
        capsys.readouterr()
    assert said[0] == said[1]
    one, other = (tmp_path / f"peft-{name}" / "adapter_model.safetensors" for name in ("mine", "one"))
    assert one.read_bytes() == other.read_bytes()
