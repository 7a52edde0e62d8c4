"""`rslora chat` on a tiny model in a file: each answer is to all that was said, by whoever is asked for."""

import io
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rslora_jax.cli import main
from rslora_jax.commands import chat as command
from rslora_jax.commands.writing import until_stop
from rslora_jax.train import read_examples

from .test_generate import by_hand

pytestmark = [pytest.mark.usefixtures("compile_fast"), pytest.mark.by_day_on("newest")]


@pytest.fixture
def talk(capsys, monkeypatch):
    """Say lines to the command; what it printed, and what it said beside."""

    def say(*lines, flags=(), status=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *map(str, flags), "--max-new", "9"]) == status
        return capsys.readouterr()

    return say


def test_each_answer_is_to_all_that_was_said_and_by_the_adapter_that_is_asked_for(place, talk, tmp_path):
    kept = tmp_path / "said.jsonl"
    lines = [
        "hi",
        "2+2=",
        "/adapter base",
        "/retry",
        f"/save {kept}",
        "/reset",
        "/system s!",
        "hi",
        "/adapter x",
        "/quit",
        "no",
    ]
    out, err = talk(*lines, flags=[place.folder / "one"])
    first = by_hand(place, "<u>hi<a>", "one")
    history = f"<u>hi<a>{first}<end><u>2+2=<a>"
    second, again = by_hand(place, history, "one"), by_hand(place, history)
    anew = by_hand(place, "<s>s!<u>hi<a>")
    assert out == f"{first}\n{second}\n{again}\n{anew}\n"
    assert "base answers" in err and "names an adapter 'x'" in err
    (example,) = read_examples(str(kept))
    assert example.completion == again and [m.content for m in example.prompt] == ["hi", first, "2+2="]


def test_ctrl_c_stops_an_answer_which_is_kept_as_far_as_it_came(place, talk, monkeypatch):
    whole = command.until_stop

    def stopped(parts, stops):
        yield next(iter(whole(parts, stops)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "until_stop", stopped)
        out, err = talk("hi", "/save /nowhere/at/all", flags=[place.folder / "one"])
    answer = by_hand(place, "<u>hi<a>", "one")
    begun = out.removesuffix(" [stopped]\n")
    assert begun != out and begun and answer.startswith(begun.strip())
    assert "/nowhere" in err


def test_what_was_answered_is_kept_where_nothing_comes_of_another_try(place, talk, monkeypatch, tmp_path):
    kept = tmp_path / "two words.jsonl"
    kept.write_text('{"text": "a"}')
    answers, whole = iter(["once", ""]), command.Answers.__call__
    monkeypatch.setattr(command.Answers, "__call__", lambda *_: next(answers))
    _, err = talk("hi", "/retry", f"/save {kept}", flags=[place.folder / "one"])
    assert "nothing was answered" in err
    assert [example.completion for example in read_examples(str(kept))] == ["a", "once"]
    monkeypatch.setattr(command.Answers, "__call__", whole)
    out, _ = talk("caf\udce9", flags=[place.folder / "one"])  # a byte that is not UTF-8
    assert out.strip() == by_hand(place, "<u>caf?<a>", "one")


def test_what_no_longer_fits_is_left_out_and_said(place, talk):
    out, err = talk("a" * 40, "b" * 40, "c" * 40, "d" * 130, flags=[place.folder / "one"])
    assert "messages no longer fit, and are left out" in err
    assert "are more than the 119 that this model takes: say less" in err
    assert len(out.splitlines()) >= 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["run", "--adapters", "a,b"], "--adapters is in place of a folder: leave out run"),
        (["--adapters", ""], "--adapters names none"),
        (["--stop", ""], "it is empty"),
        (["no-such-run"], "no-such-run"),
    ],
)
def test_flags_that_cannot_be(talk, flags, said):
    assert said in talk(flags=flags, status=2).err


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text("abc", max_size=4), max_size=6), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_the_first_of_its_stops_however_it_comes(parts, stops):
    text = "".join(parts)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert "".join(until_stop(parts, stops)) == text[: min(ends, default=len(text))]


def test_a_stop_is_obeyed_by_generate_too(place, capsys):
    whole = by_hand(place, "<u>hi<a>", "one")
    stop = whole[3:5]
    flags = [str(place.folder / "one"), "--max-new", "9", "--stop", stop]
    for prompts in (["--prompt", "hi"], ["--prompt", "hi", "--prompt", "hi"]):
        assert main(["generate", *flags, *prompts]) == 0
        out = capsys.readouterr().out
        assert whole[: whole.index(stop)].strip() in out and stop not in out.replace("> hi", "")
