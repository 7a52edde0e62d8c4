"""`rslora train --data`: forms and files, columns, bad lines, what is cut, and several files by weight."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax import train
from rslora_jax.cli import main
from rslora_jax.commands import heldout, run_data
from rslora_jax.commands import train as command
from rslora_jax.commands.sources import columns_of, sources_of
from rslora_jax.train import Example
from rslora_jax.train.bytelevel import ByteTokenizer
from tests.commands.conftest import SUMS

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
SHORT = ["--steps", "2", "--rank", "3", "--max-len", "48", "--heldout", "2", "--save-every", "1"]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text(lines(SUMS))
    return tmp_path


class Stop(Exception):
    """The model would be read now."""


@pytest.fixture
def chosen(monkeypatch):
    """What a command line chooses, up to the model."""
    seen = []
    choose = run_data.choose
    monkeypatch.setattr(run_data, "choose", lambda a: seen.append(choose(a)) or seen[-1])
    monkeypatch.setattr(command, "_read_base", lambda *a: (_ for _ in ()).throw(ValueError("no further")))
    return seen


CHAT = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
FORMS = {
    "alpaca.json": (json.dumps([{"instruction": "i", "input": "", "output": f"{n}"} for n in range(4)]), []),
    "sharegpt.jsonl": (lines([{"conversations": CHAT}] * 4), []),
    "table.csv": ("prompt,completion\n" + "p,c\n" * 4, []),
    "named.csv": ("q,a\n" + "p,c\n" * 4, ["--columns", "prompt=q,completion=a"]),
    "pairs.jsonl": (
        lines([{"prompt": "p", "chosen": "c", "rejected": "r"}] * 4),
        ["--columns", "prompt=prompt,completion=chosen"],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_and_files_are_taken_by_the_command_line(name, folder, chosen, capsys):
    text, flags = FORMS[name]
    (folder / name).write_text(text)
    assert main(["train", "--data", name, *flags]) == 2
    out, err = capsys.readouterr()
    assert "3 examples are learnt from, 1 are held out and scored" in out, err
    ((found, record, skipped),) = chosen
    assert len(found.training) == 3 and skipped is None and record["rule"] == 2


REFUSED = {
    "preferences": (
        "pairs.jsonl",
        [],
        "learn from what was chosen alone with --columns prompt=prompt,completion=chosen",
    ),
    "no key": (
        "pairs.jsonl",
        ["--columns", "pormpt=p"],
        "--columns has pormpt, which is a key of no form; did you mean",
    ),
    "no column": ("pairs.jsonl", ["--columns", "prompt"], "--columns prompt is not of the form KEY=COLUMN"),
    "half a form": ("pairs.jsonl", ["--columns", "prompt=a"], "names not all keys of a form"),
    "another column": ("pairs.jsonl", ["--columns", "text=words"], 'lacks the key "words" that --columns names'),
    "half weighted": ("sums.jsonl=1", ["pairs.jsonl"], "--data pairs.jsonl has no weight, and others have"),
    "a weight": ("sums.jsonl=-1", [], "--data sums.jsonl=-1: -1 is not a number above 0, the weight of sums.jsonl"),
    "twice": ("sums.jsonl", ["sums.jsonl"], "--data names sums.jsonl twice"),
    "no package": ("no-one/nothing", [], "is no file here, and a data set of Hugging Face is read by `datasets`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(case, folder, chosen, capsys):
    name, flags, said = REFUSED[case]
    if case == "no package" and __import__("importlib.util").util.find_spec("datasets"):
        pytest.skip("it is installed")
    (folder / "pairs.jsonl").write_text(FORMS["pairs.jsonl"][0])
    assert main(["train", "--data", name, *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not chosen


def test_several_files_are_one_and_a_file_of_settings_may_name_them(folder, chosen, capsys):
    (folder / "more.jsonl").write_text(lines(SUMS[:10]))
    for flags in (
        ["--data", "sums.jsonl", "more.jsonl"],
        ["--data", "sums.jsonl", "--data", "more.jsonl"],
        ["--set", 'data=["sums.jsonl", "more.jsonl"]'],
    ):
        assert main(["train", *flags]) == 2
        assert "sums.jsonl more.jsonl: 45 examples are learnt from, 5 are held out" in capsys.readouterr().out
    assert {len(one.split.parts) for one in chosen} == {1}
    for flags in (["--data", "sums.jsonl=3", "more.jsonl=1"], ["--set", 'data={"sums.jsonl"=3, "more.jsonl"=1}']):
        assert main(["train", *flags]) == 2
        assert [len(part) for part in chosen[-1].split.parts] == [36, 9] and chosen[-1].record["mixed"] == [3, 1]


def test_bad_lines_are_left_out_counted_and_listed_and_what_is_cut_is_named(folder, place, capsys):
    bad = ["7", '{"text": 3}', '{"prompt": "p"}', "{"]
    long = {"question": "q" * 60, "answer": "a" * 60}
    refused = {"question": "Who?", "answer": "He.<end>She."}  # what ends a turn, in its middle
    rows = [json.dumps(row) for row in [*SUMS[:12], long, refused]]
    (folder / "mine.jsonl").write_text("\n".join([*rows[:3], *bad, *rows[3:]]))
    start = ["train", "--model", str(place.folder / "model.gguf"), "--out", "run", "--data", "mine.jsonl", *SHORT]
    assert main(start) == 2
    assert "4 bad lines: mine.jsonl:4 is a number" in capsys.readouterr().err
    assert main([*start, "--skip-bad"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "left out 5 bad examples, all of them in run/skipped.txt:\n  mine.jsonl:4 is a number" in out
    assert "  and 2 more" in out and "training data: 12 examples" in out
    assert out.count("\n  cut: mine.jsonl:17, ") == 1 and "of 61 tokens of its completion" in out
    listed = (folder / "run" / "skipped.txt").read_text().splitlines()
    assert [line.split()[0] for line in listed[:4]] == [f"mine.jsonl:{n}" for n in (4, 5, 6, 7)]
    assert listed[4].startswith("mine.jsonl:18 cannot be encoded: the answer holds '<end>'")


@pytest.mark.nightly
def test_a_mixed_run_resumes_bit_for_bit_and_by_no_other_shares(folder, place, capsys):
    (folder / "more.jsonl").write_text(lines([{"question": f"{n}?", "answer": "!"} for n in range(10)]))
    start = ["train", "--model", str(place.folder / "model.gguf"), *SHORT, "--data", "sums.jsonl=0.7", "more.jsonl=0.3"]
    assert main([*start, "--out", "whole", "--steps", "4", "--schedule", "constant"]) == 0, capsys.readouterr().err
    assert "sums.jsonl: 70.0% of all rows; its own" in capsys.readouterr().out
    assert main([*start, "--out", "run", "--schedule", "constant"]) == 0
    capsys.readouterr()
    others = ["--data", "sums.jsonl=0.5", "more.jsonl=0.5"]
    resume = ["train", "--resume", "--out", "run", "--steps", "4"]
    assert main([*resume, *others]) == 2
    assert "mixes its files by other shares than when the run was saved" in capsys.readouterr().err
    assert main(resume) == 0, capsys.readouterr().err
    found = []
    for name in ("whole", "run"):
        records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        found.append([(record["step"], record["loss"]) for record in records if "loss" in record])
    assert found[0] == found[1] and len(found[0]) == 4


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=2, max_size=3),
    weights=st.data(),
    seed=st.integers(0, 9),
    batch_size=st.integers(3, 5),
)
def test_rows_are_mixed_by_weight_and_every_row_once_an_epoch_of_its_file(sizes, weights, seed, batch_size):
    shares = [weights.draw(st.integers(1, 9)) / 10 for _ in sizes]
    tokenizer = ByteTokenizer()
    parts = [
        train.prepare(tokenizer, [Example("", f"{chr(65 + file)}{n:03}") for n in range(size)], max_len=5)
        for file, size in enumerate(sizes)
    ]
    rows = train.batches.joined(parts, sizes)
    assert rows.statistics.examples == sum(sizes) == len(rows.rows)
    mixed = [(size, share) for size, share in zip(sizes, shares, strict=True)]
    batches = train.train_batches(rows, batch_size=batch_size, seed=seed, mixed=mixed)
    count = 40 // batch_size
    texts = [tokenizer.decode(row) for n in range(count) for row in batches[n].tokens_BxT]
    for file, (size, share) in enumerate(mixed):
        own = [text for text in texts if text[0] == chr(65 + file)]
        assert abs(len(own) - len(texts) * share / sum(shares)) <= len(sizes)  # as evenly as can be
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size  # each row once an epoch
    again = train.train_batches(rows, batch_size=batch_size, seed=seed, mixed=mixed)
    np.testing.assert_array_equal(again[count - 1].tokens_BxT, batches[count - 1].tokens_BxT)


def test_a_file_of_a_mixed_run_is_scored_but_for_what_was_learnt(folder):
    (folder / "more.jsonl").write_text(lines(SUMS[:10]))
    started = {"data": [f"{folder}/sums.jsonl=3", f"{folder}/more.jsonl=1"], "examples": {"rule": 2}}
    everything = heldout.all_of("sums.jsonl")
    found = heldout.to_score("sums.jsonl", everything, [started])
    assert found == everything[9::10]


def test_sources_and_columns_are_read_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1").write_text("x")
    assert sources_of("a=1")[0].weight is None  # a file of that name
    assert sources_of("b=1")[0] == ("b", 1.0)
    assert columns_of(None) == {} and columns_of("text=a b") == {"text": "a b"}
