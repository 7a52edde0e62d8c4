"""What reaches a terminal: nothing of data, answers or names steers it, by any command; files keep all of it."""

import contextlib
import io
import json
import re
import shutil
import sys
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from rslora_jax.cli import main
from rslora_jax.interop.tokenizer import Tokenizer
from rslora_jax.terminal import one_line, printable, shown

# A title for the window, the screen cleared, a line drawn over, a bell, text from right to left, C1's CSI, colours.
HOSTILE = "\x1b]0;evil\x07\x1b[2J\rforged\u202eevil\x9b31m\x1b[5;35;43m$x_{$[/red]"
# What rich's bars write.
BAR = re.compile(r"\x1b\[\?25[lh]|\r?\x1b\[(?:1A|2K)|\r(?=\x1b|$)|\x1b\[(?:\d+(?:;\d+)*)?m")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def on_terminal(monkeypatch):
    screen = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        patched.setattr(sys, "stderr", screen)
        patched.setenv("TERM", "xterm")
        yield screen


def steering(text):
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    return [
        c for c in text if (unicodedata.category(c) in kinds and c != "\n") or c in "\u202a\u202b\u202d\u202e\u2066"
    ]


@settings(deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from("\x1b\x07\r\n\t\x9b\u202e\u2028\u200d"))))
@example("".join(map(chr, range(0x110000))))
def test_printable_text_steers_nothing_and_other_text_is_as_it_was(text):
    found = printable(text)
    assert not steering(found) and not steering(one_line(text)) and "\n" not in one_line(text)
    assert found.count("\n") == text.count("\n") and len(one_line(text)) <= 300
    if text.isprintable():
        assert found == text


def test_what_is_printed_to_a_terminal_is_printable_and_to_a_file_as_it_is(monkeypatch):
    screen, file = Terminal(), io.StringIO()
    for stream, want in ((screen, printable(HOSTILE) + "\n"), (file, HOSTILE + "\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        with shown():
            print(HOSTILE)
        assert stream.getvalue() == want and sys.stdout is stream


@pytest.fixture(scope="module")
def hostile(place, tmp_path_factory):
    """Folders and files whose names and content steer a terminal: a run, a model, data."""
    folder = tmp_path_factory.mktemp("hostile")
    name = HOSTILE.replace("/", "")
    shutil.copytree(place.folder / "one", folder / name)
    shutil.copy(place.folder / "model.gguf", folder / f"{name}.gguf")
    lines = [{"question": f"{HOSTILE}{n}", "answer": f"{n}{HOSTILE}"} for n in range(20)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"bad{name}.jsonl").write_text(json.dumps({HOSTILE: "a", "b\x1b[2J": HOSTILE}) + "\n")
    return folder, name


def commands(folder, name):
    run, model, data = folder / name, folder / f"{name}.gguf", folder / f"{name}.jsonl"
    bad, out = folder / f"bad{name}.jsonl", folder / "out"
    short = ["--max-len", "64", "--heldout", "2", "--rank", "3", "--batch-size", "1", "--steps", "2"]
    return {
        "train": (["train", "--model", model, "--data", data, "--out", folder / f"{name}-run", *short], 0),
        "generate": (["generate", run, "--model", model, "--prompt", HOSTILE, "--max-new", "8"], 0),
        "many": (["generate", run, "--prompts", data, "--max-new", "8", "--out", folder / f"{name}.out"], 0),
        "eval": (
            ["eval", run, "--model", model, "--data", data, "--max-len", "64", "--exact-match", "--max-new", "4"],
            0,
        ),
        "inspect": (["inspect", run, "--model", model, "--out", out / name], 0),
        "merge": (["merge", run, "--model", model, "--out", out / f"{name}-merged"], 0),
        "export": (["export", run, "--model", model, "--out", out / f"{name}-peft", "--for", "vllm"], 0),
        "import": (["import", out / f"{name}-peft", "--model", model, "--out", out / f"{name}-again"], 0),
        "bad data": (["train", "--data", bad, "--out", folder / "no"], 2),
        "no model": (["eval", "--model", f"{model}-not-there.gguf"], 2),
        "no folder": (["merge", f"{run}-not-there", "--out", out / "no"], 2),
        "no command": ([HOSTILE], 2),
        "no flag": (["eval", f"--{HOSTILE}"], 2),
        "no number": (["eval", "--max-new", HOSTILE * 99], 2),
    }


@pytest.mark.by_day_on("oldest")
@pytest.mark.usefixtures("compile_fast")
def test_no_command_lets_names_data_or_answers_steer_the_terminal(hostile, monkeypatch):
    decode = Tokenizer.decode

    def answered(self, ids, *, skip_special=False):
        return decode(self, ids, skip_special=skip_special) + (HOSTILE if skip_special else "")

    monkeypatch.setattr(Tokenizer, "decode", answered)
    monkeypatch.setattr("rslora_jax.commands.progress.progress_line.__defaults__", (0.0,))
    for what, (arguments, status) in commands(*hostile).items():
        with on_terminal(monkeypatch) as screen:
            got = main([str(one) for one in arguments])
        said = screen.getvalue()
        assert got == status, (what, said)
        rest = BAR.sub("", said)
        assert not steering(rest), (what, rest)
        assert "\x1b[5;35;43m" not in said and "\x1b]" not in said, what
        if status == 2:
            assert len(said.splitlines()[-1]) < 330 and said.count("rslora: error: ") == 1, said
    written = (hostile[0] / f"{hostile[1]}.out").read_text()
    assert json.loads(written.splitlines()[0])["completion"].endswith(HOSTILE.strip())
