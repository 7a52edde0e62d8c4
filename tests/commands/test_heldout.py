"""What `rslora train` learns from and what it holds out, by its flags, its printed counts and what it records."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from rslora_jax.cli import main
from rslora_jax.commands import heldout as data
from rslora_jax.commands import settings
from rslora_jax.commands import train as command
from rslora_jax.commands.heldout import Asked, split, to_score
from rslora_jax.commands.settings import examples_to_save
from rslora_jax.train import Example
from tests.commands.conftest import SUMS

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
SHORT = ["--steps", "1", "--rank", "3", "--max-len", "48"]


def of(asked):
    found = split(asked)
    return found.training, found.heldout


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@of_hypothesis(deadline=None)
@given(count=st.integers(1, 400), heldout=st.none() | st.integers(0, 450), rule=st.just(2))
def test_no_line_is_in_neither_or_both(count, heldout, rule):
    everything = [Example("", str(n)) for n in range(count)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "read_examples", lambda path, **how: everything)
        asked = Asked("mine", heldout, None, rule)
        if heldout is not None and heldout >= count:
            with pytest.raises(ValueError, match="holds out all of them: ask for fewer"):
                of(asked)
            return
        training, held = of(asked)
    numbers = [int(example.completion) for example in held]
    assert sorted([*numbers, *(int(example.completion) for example in training)]) == list(range(count))
    if heldout is not None:
        assert len(held) == heldout
        gaps = {after - before for before, after in itertools.pairwise(numbers)}
        assert not gaps or max(gaps) - min(gaps) <= 1  # spread evenly
    elif count >= 10:
        assert numbers == [n for n in range(count) if n % 10 == 9]
    else:
        assert numbers == [count - 1] * (count > 1)


@of_hypothesis(deadline=None)
@given(count=st.integers(1, 400), heldout=st.integers(1, 40))
def test_a_run_of_before_goes_on_with_the_lines_that_it_began_with(count, heldout):
    everything = [Example("", str(n)) for n in range(count)]
    tenths = [n for n in range(count) if n % 10 == 9] or list(range(count))[1:][-1:]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "read_examples", lambda path, **how: everything)
        settings = {"data": "mine", "heldout": heldout, "examples": {"training": "", "heldout": ""}}
        training, held = of(Asked.of(settings))
        scored = to_score("mine", everything, [settings]) if tenths else []
    every = -(-len(tenths) // heldout) or 1
    assert [int(e.completion) for e in training] == [n for n in range(count) if n not in tenths]
    assert [int(e.completion) for e in held] == [int(e.completion) for e in scored] == tenths[::every]


@of_hypothesis(deadline=None)
@given(
    count=st.integers(2, 200), runs=st.lists(st.none() | st.integers(0, 60), min_size=1, max_size=3), seed=st.integers()
)
def test_what_is_scored_no_run_has_learnt_from(count, runs, seed):
    everything = [Example("", str(n)) for n in range(count)]
    started, learnt = [], set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "read_examples", lambda path, **how: everything)
        for heldout in runs:
            if heldout is not None:
                heldout = min(heldout, count - 1)
            training, held = of(Asked("mine", heldout))
            learnt |= {example.completion for example in training}
            started.append({"data": "mine", "heldout": heldout, "examples": examples_to_save(training, held)})
    left = [example for example in everything if example.completion not in learnt]
    if left:
        most = runs[0] and min(runs[0], count - 1)
        found = to_score("./mine", everything, started)
        assert not {example.completion for example in found} & learnt
        assert found == left if not most or len(left) <= most else found
    else:
        with pytest.raises(ValueError, match="was learnt from: give other examples with --data, or score these"):
            to_score("./mine", everything, started)
    assert to_score("other", everything, started) == everything


CASES = {
    "a tenth": ([], (36, 4), "36 examples are learnt from, 4 are held out and scored"),
    "two": (["--heldout", "2"], (38, 2), "38 examples are learnt from, 2 are held out and scored"),
    "none": (["--heldout", "0"], (40, 0), "all 40 examples are learnt from; none is held out, so none is scored"),
    "a file": (["--eval-data", "more.jsonl"], (40, 7), "all 40 examples are learnt from; 7 of more.jsonl are scored"),
    "some of it": (["--eval-data", "more.jsonl", "--heldout", "3"], (40, 3), "3 of more.jsonl are scored"),
    "all": (["--heldout", "40"], None, "has 40 examples, and --heldout 40 holds out all of them: ask for fewer"),
    "both": (["--heldout", "0", "--eval-data", "more.jsonl"], None, "--heldout 0 scores nothing, and --eval-data"),
    "a config": (["--config", "c.toml"], (37, 3), "3 are held out"),
}


@pytest.fixture
def folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.jsonl", SUMS)
    write(tmp_path / "more.jsonl", [{"question": f"{n}?", "answer": "!"} for n in range(7)])
    (tmp_path / "c.toml").write_text("heldout = 3\n")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_train_says_what_it_learns_from_and_what_it_scores(case, folder, place, capsys, monkeypatch):
    flags, counts, said = CASES[case]
    seen = []
    monkeypatch.setattr(command, "_read_base", lambda *a: (_ for _ in ()).throw(ValueError("no further")))
    monkeypatch.setattr(settings, "examples_to_save", lambda t, h, rule, m: seen.append((len(t), len(h), rule)))
    assert main(["train", "--data", "mine.jsonl", *flags]) == 2
    out, err = capsys.readouterr()
    assert said in out + err
    assert seen == ([] if counts is None else [(*counts, 2)])


@pytest.mark.nightly
def test_a_run_that_holds_out_nothing_trains_resumes_and_cannot_be_scored_on_its_data(folder, place, capsys):
    start = ["train", "--model", str(place.folder / "model.gguf"), "--data", "mine.jsonl", "--out", "run", *SHORT]
    assert main([*start, "--heldout", "0"]) == 0, capsys.readouterr().err
    assert "held-out perplexity" not in capsys.readouterr().out
    assert main(["train", "--resume", "--out", "run", "--steps", "2"]) == 0, capsys.readouterr().err
    assert main(["eval", "run"]) == 2
    assert (
        "all of " in (error := capsys.readouterr().err)
        and "with --data, or score these all the same with --all" in error
    )
    assert main(["eval", "run", "--data", "mine.jsonl"]) == 2
    for flags, many in (
        (["--data", "more.jsonl"], 7),
        (["--data", "more.jsonl", "--heldout", "2"], 2),
        (["--all"], 40),
    ):
        assert main(["eval", "run", *flags, "--json", "scores.json"]) == 0
        assert json.loads((folder / "scores.json").read_text())["examples"] == many


@pytest.mark.nightly
def test_what_is_scored_of_another_file_is_what_eval_scores(folder, place, capsys):
    start = ["train", "--model", str(place.folder / "model.gguf"), "--data", "mine.jsonl", "--out", "run", *SHORT]
    assert main([*start, "--eval-data", "more.jsonl"]) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record["heldout_loss"] for record in records if "heldout_loss" in record][-1]
    assert main(["eval", "run", "--json", "scores.json"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["examples"] == 7 and scores["models"][1]["loss"] == pytest.approx(last, rel=1e-5)
    write(folder / "more.jsonl", [{"question": "?", "answer": "!"}])
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "run", "--steps", "2"]) == 2
    assert "holds out other examples than when the run was saved" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_run_of_before_resumes_on_its_own_lines(folder, place, capsys, monkeypatch):
    """The settings of a run of rule 1, as it was saved, and the digests of what it learnt from."""
    start = ["train", "--model", str(place.folder / "model.gguf"), "--data", "mine.jsonl", "--out", "run", *SHORT]
    monkeypatch.setattr(settings, "rule_of", lambda a: 1)
    save = settings.examples_to_save
    monkeypatch.setattr(
        settings, "examples_to_save", lambda *args: {k: v for k, v in save(*args).items() if k != "rule"}
    )
    assert main([*start, "--heldout", "2"]) == 0
    assert "36 examples are learnt from, 2 are held out" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["train", "--resume", "--out", "run", "--steps", "2"]) == 0, capsys.readouterr().err
    assert "36 examples are learnt from, 2 are held out" in capsys.readouterr().out
