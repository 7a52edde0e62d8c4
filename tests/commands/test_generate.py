"""`rslora generate` on a tiny model in a file, against the library called by hand."""

import io
import json
import sys

import jax
import pytest

from rslora_jax.cli import main
from rslora_jax.commands.prompts import prompt_ids, read_prompts
from rslora_jax.commands.writing import unfolding
from rslora_jax.models.decoder import Decoder
from rslora_jax.models.generation import generate
from rslora_jax.train.bytelevel import ByteTokenizer

from .conftest import save_run, tiny_model

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]
NEW = ["--max-new", "9"]


def answered(place, capsys, *arguments):
    """Run the command; return what it printed and what it said beside."""
    assert main(["generate", *map(str, arguments), *NEW]) == 0
    return capsys.readouterr()


def by_hand(place, text, run=None, **options):
    """What the library gives for one prompt: the merged weights, the whole at once."""
    config, variables, tokenizer = place.base
    if run:
        lora, adapters = place.runs[run]
        variables = lora.merge(variables, adapters)
    ids = tokenizer.encode(text)
    (out,) = generate(Decoder(config).apply, variables, [ids], config, max_new=9, eos_id=tokenizer.stop_ids, **options)
    return tokenizer.decode(out, skip_special=True).strip()


def test_one_prompt_is_answered_by_the_run_the_merged_run_and_the_base(place, capsys):
    model, question = place.folder / "model.gguf", ["--prompt", "hi 1+1="]
    chat = "<u>hi 1+1=<a>"
    out, err = answered(place, capsys, place.folder / "one", *question)
    assert out.strip() == by_hand(place, chat, "one")
    assert "prompt tokens 12 (" in err and "to compile" in err and "new tokens" in err
    assert answered(place, capsys, place.folder / "one", "--merged", *question).out == out
    base = answered(place, capsys, "--model", model, *question).out
    assert base.strip() == by_hand(place, chat) != out.strip()
    plain = answered(place, capsys, "--model", model, "--plain", *question).out
    assert plain.strip() == by_hand(place, "hi 1+1=") != base.strip()


def test_a_batch_gives_what_each_prompt_gives_alone_and_a_file_of_them(place, capsys, tmp_path):
    lines = [{"prompt": "hi"}, {"question": "2+2=", "answer": "4"}, {"messages": [{"role": "user", "content": "3"}]}]
    lines[2]["messages"].append({"role": "assistant", "content": "!"})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "answers.jsonl"
    flags = ["--prompt", "a longer one", "--prompts", tmp_path / "p.jsonl", "--batch-size", 3, "--out", out]
    shown = answered(place, capsys, place.folder / "one", *flags).out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    questions = ["a longer one", "hi", "2+2=", "3"]
    assert [record["completion"] for record in records] == [by_hand(place, f"<u>{q}<a>", "one") for q in questions]
    assert records[1]["prompt"] == "hi" and records[3]["prompt"] == [{"role": "user", "content": "3"}]
    assert all(f"> {question}\n" in shown for question in questions)


def test_lines_of_the_input_are_answered_as_they_come(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n2+2=\n"))
    out = answered(place, capsys, place.folder / "one").out
    assert out.strip() == f"{by_hand(place, '<u>hi<a>', 'one')}\n{by_hand(place, '<u>2+2=<a>', 'one')}".strip()


def test_draws_follow_the_seed_and_top_p(place, capsys):
    def draw(*flags):
        return answered(place, capsys, place.folder / "one", "--prompt", "hi", "--temperature", "2", *flags).out.strip()

    first = draw()
    assert first != draw("--seed", "1")
    key = jax.random.fold_in(jax.random.key(0), 0)
    assert first == by_hand(place, "<u>hi<a>", "one", temperature=2.0, key=key)
    greedy = by_hand(place, "<u>hi<a>", "one")
    assert draw("--top-p", "0.000001") == greedy != first


def test_half_characters_wait_for_their_other_half_and_nothing_is_lost():
    text = "né 漢字🎉\ufffd!é"
    ids = [*ByteTokenizer().encode(text), 0xE6, 0xBC]
    for size in (1, 2, 3, 5, 99):
        pieces = [ids[n : n + size] for n in range(0, len(ids), size)]
        parts = list(unfolding(pieces, ByteTokenizer().decode))
        assert "".join(parts) == ByteTokenizer().decode(ids)
        assert all(not part.endswith("\ufffd") for part in parts[:-1]) and parts[-1].endswith("\ufffd")
    assert list(unfolding([], ByteTokenizer().decode)) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["one", "--prompt", " "], "a prompt is empty"),
        (["one", "--prompt", "x" * 140], "exceed max_len=128: cut one"),
        (["one", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["one", "--prompts", "blank.txt"], "blank.txt holds no prompt"),
        (["one", "--prompts", "bad.jsonl"], "bad.jsonl:2 is not JSON"),
        (["one", "--prompts", "other.jsonl"], "other.jsonl:1 is not {"),
        (["one", "--prompts", "turns.jsonl"], "turns.jsonl:1 has in message"),
        (["nowhere", "--prompt", "hi"], "nowhere is not a folder: give that of a run"),
        (["one", "--prompt", "hi", "--step", "7"], "no checkpoint of step 7: it has steps 5"),
        (["one", "--prompt", "hi", "--step", "first"], "--step first is neither"),
        (["one", "--prompt", "hi", "--max-new", "0"], "--max-new: 0 is not a whole number of at least 1"),
        (["one", "--prompt", "hi", "--top-p", "0"], "--top-p: 0 is not a number above 0 and of at most 1"),
        (["one", "--prompt", "hi", "--top-k", "-1"], "--top-k: -1 is not a whole number of at least 0"),
        (["one", "--prompt", "hi", "--min-p", "2"], "--min-p: 2 is not a number of at least 0 and of at most 1"),
        (["one", "--prompt", "hi", "--temperature", "nan"], "--temperature: nan is not a number of at least 0"),
        (["one", "--prompt", "hi", "--repetition-penalty", "0"], "--repetition-penalty: 0 is not a number above 0"),
        (["--prompt", "hi", "--merged"], "--merged needs a run"),
        (["one", "--prompt", "hi", "--out", "no/where.jsonl"], "no is no folder"),
        (["one", "--prompt", "hi", "--model", "other.gguf"], "was trained with another base"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, said, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").symlink_to(place.folder / "one")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p"}\n{"prompt"')
    (tmp_path / "other.jsonl").write_text('{"text": "t"}\n')
    (tmp_path / "turns.jsonl").write_text('{"messages": [{"role": "king", "content": "t"}]}\n')
    if "other.gguf" in flags:
        other = tiny_model()
        other.weights["output_norm.weight"][0] += 0.5
        other.write(tmp_path / "other.gguf")
    before = set(tmp_path.iterdir())
    assert main(["generate", *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rslora: error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert set(tmp_path.iterdir()) == before


def test_options_of_the_chat_template_are_the_runs_own_or_given(place, capsys, tmp_path):
    model = tiny_model()
    ask = "{% if add_generation_prompt %}<a>{% if brief is defined %}{{ brief }}{% endif %}{% endif %}"
    template = model.metadata["tokenizer.chat_template"].replace("{% if add_generation_prompt %}<a>{% endif %}", ask)
    model.metadata["tokenizer.chat_template"] = template
    file = model.write(tmp_path / "model.gguf")
    settings = {"model": str(file), "template_option": ["brief=hi"]}
    save_run(tmp_path / "run", place.base, place.runs["one"][0].config, 0, settings)
    run = [str(tmp_path / "run"), "--prompt", "1+1="]
    assert answered(place, capsys, *run).out.strip() == by_hand(place, "<u>1+1=<a>hi", "one")
    given = answered(place, capsys, *run, "--template-option", "brief=!").out
    assert given.strip() == by_hand(place, "<u>1+1=<a>!", "one")
    assert main(["generate", *run, "--template-option", "brie=!"]) == 2
    assert "has no option brie: did you mean brief?" in capsys.readouterr().err
    assert main(["generate", *run, "--template-option", "brief"]) == 2
    assert "--template-option brief is not of the form NAME=VALUE" in capsys.readouterr().err


def test_prompts_without_a_template_are_as_in_training(tmp_path):
    assert prompt_ids(ByteTokenizer(), ({"role": "user", "content": "ab"},), plain=False) == [97, 98, 10]
    with pytest.raises(ValueError, match="needs a chat template"):
        prompt_ids(ByteTokenizer(), ({"role": "system", "content": "a"}, {"role": "user", "content": "b"}), plain=False)
    (tmp_path / "p.txt").write_text("\ufeff one \r\n\n two")
    assert [asked.prompt for asked in read_prompts(str(tmp_path / "p.txt"))] == [" one ", " two"]
