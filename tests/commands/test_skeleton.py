"""What all commands have in common: help, near misses, errors in a sentence, interrupts, and how one is added."""

import ast
import dataclasses
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import flax
import hypothesis.strategies as st
import jax
import pytest
from hypothesis import given, settings

import rslora_jax
from rslora_jax.cli import COMMANDS, main, parse, parser
from rslora_jax.commands.command import Command

ROOT = Path(rslora_jax.__file__).parent
REPOSITORY = ROOT.parent
NEEDED = {
    "import": ["in", "--out", "o"],
    "export": ["in", "--out", "o"],
    "merge": ["in", "--out", "o"],
    "inspect": ["in"],
    "combine": ["in", "in", "--out", "o"],
}
# The flags that scripts and notebooks of users may have: a command may get more, and keeps these.
FLAGS = {
    "train": "config set epochs bf16 attention init allow-large-rank exclude moments "
    "model data cache max-len heldout template-option rank alpha scaling targets adapters steps "
    "batch-size accumulate optimizer optimizer-option learning-rate schedule warmup clip patience on-nonfinite "
    "seed dtype param-dtype remat mesh split-rank distributed out eval-every save-every keep tensorboard resume plan",
    "generate": "model step merged dtype prompt prompts plain template-option batch-size max-new temperature top-k "
    "top-p min-p repetition-penalty stop seed out",
    "chat": "model step adapters dtype system template-option max-new temperature top-k top-p min-p repetition-penalty "
    "stop seed",
    "eval": "model step dtype data all heldout max-len template-option batch-size exact-match max-new json",
    "inspect": "step model no-base all out",
    "merge": "out dtype step model max-shard-size",
    "export": "out for use-rslora step dtype model base-model",
    "import": "model param-dtype out",
    "combine": "out to weights method rank density majority-sign seed model step base-model",
}


def error_of(arguments, capsys):
    """Run a command line that must fail; return its one sentence."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("rslora: error: ") and err.count("\n") == 1, (out, err)
    return err


def help_of(arguments, capsys, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def misspelt(word):
    """Words that come close: two letters swapped, one left out, one doubled."""
    n = max(3, len(word) // 2)
    return {
        word[: n - 1] + word[n : n + 1] + word[n - 1] + word[n + 1 :],
        word[:n] + word[n + 1 :],
        word[:n] + word[n - 1 :],
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_command_or_flag_is_named_with_what_comes_close(command, capsys):
    for wrong in misspelt(command) - {command}:
        assert f"there is no command {wrong}; did you mean {command}?" in error_of([wrong], capsys)
    for flag in FLAGS[command].split():
        for wrong in misspelt(f"--{flag}") - {f"--{flag}"}:
            if any(f"--{other}".startswith(wrong) for other in FLAGS[command].split()):
                continue  # argparse takes a flag's beginning for the flag
            said = error_of([command, *NEEDED.get(command, []), wrong], capsys)
            near = re.search(rf"`rslora {command}` has no flag {wrong}; did you mean --([\w-]+)\?", said)
            assert near and near[1] in FLAGS[command].split(), said
    assert f"rslora {command} --help" in error_of([command, *NEEDED.get(command, []), "--qqqqqqq"], capsys)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=9), min_size=1, max_size=4))
def test_a_line_of_anything_is_read_or_refused_in_a_sentence(words):
    for command in COMMANDS:
        try:
            found, _ = parse([command, *words])
        except (ValueError, SystemExit) as refused:
            assert isinstance(refused, SystemExit) or "\n" not in str(refused)
        else:
            assert found is COMMANDS[command]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing-like-it"], "there are train, generate, chat, eval"),
        (["--verzion"], "did you mean --version?"),
        (["merge", "in"], "the following arguments are required: --out; `rslora merge --help`"),
        (["export", "a", "b", "--out", "c"], "`rslora export` has no place for b"),
        (
            ["eval", "--batch-size", "x"],
            "argument --batch-size: x is not a whole number of at least 1; `rslora eval --help`",
        ),
        (["train", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    ],
)
def test_bad_command_lines_are_one_sentence(arguments, said, capsys):
    assert said in error_of(arguments, capsys)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_the_terminal_and_shows_examples_that_can_be_run(command, columns, capsys, monkeypatch):
    text = help_of([command] if command else [], capsys, columns, monkeypatch)
    assert max(map(len, text.splitlines())) <= columns
    examples = re.findall(r"^  (rslora .*(?:(?<=\\)\n.*)*)", text.split("\nexamples:\n")[1], re.MULTILINE)
    assert examples
    for line in examples:
        words = shlex.split(line.partition(" < ")[0].replace("\\\n", ""))
        if "--help" not in words:
            arguments = parser().parse_args(words[1:])
            assert arguments.command in COMMANDS and command in (None, arguments.command)
    if command:
        assert {f"--{flag}" for flag in FLAGS[command].split()} <= set(re.findall(r"--[\w-]+", text))
    else:
        assert all(f"    {name} " in text for name in COMMANDS)


def test_the_commands_that_the_documents_show_can_be_read():
    pages = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*/README.md")]
    lines = [line for page in pages for line in re.findall(r"(?:^|&& )(rslora .*)$", page.read_text(), re.MULTILINE)]
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(line, comments=True)
        assert parser().parse_args(words[1:]).command, line


def test_without_a_command_there_is_the_help_and_the_version_is_that_of_what_is_installed(capsys, monkeypatch):
    assert main([]) == 0
    assert capsys.readouterr().out == help_of([], capsys, os.environ.get("COLUMNS", 80), monkeypatch)
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"rslora \d+\.\d+\.\d+ ", said)
    assert f"jax {jax.__version__}, flax {flax.__version__}, Python {sys.version.split()[0]}" in said


ENDS = [
    (KeyboardInterrupt(), 130, "rslora: interrupted; half a cake is left\n"),
    (signal.SIGTERM, 143, "rslora: ended; half a cake is left\n"),
    (signal.SIGHUP, 129, "rslora: ended; half a cake is left\n"),
    (ValueError("there is no flour: buy some"), 2, "rslora: error: there is no flour: buy some\n"),
    (ImportError("an oven needs gas"), 2, "rslora: error: an oven needs gas\n"),
    (PermissionError(13, "Permission denied", "cake"), 2, "rslora: error: cake: permission denied\n"),
    (OSError(28, "No space left on device"), 2, "rslora: error: no space left on device\n"),
    (7, 7, ""),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("end", "status", "said"), ENDS, ids=[f"{type(end).__name__}" for end, _, _ in ENDS])
def test_however_a_command_ends_its_status_and_one_sentence_say_so(command, end, status, said, capsys, monkeypatch):
    def run(arguments):
        if isinstance(end, Exception | KeyboardInterrupt):
            raise end
        if isinstance(end, signal.Signals):
            assert signal.getsignal(end) is not signal.SIG_DFL  # which would end the tests
            os.kill(os.getpid(), end)
        return end

    changed = dataclasses.replace(COMMANDS[command], run=run, left=lambda arguments: "half a cake is left")
    monkeypatch.setitem(COMMANDS, command, changed)
    assert main([command, *NEEDED.get(command, [])]) == status
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_bug_is_no_sentence(monkeypatch):
    def run(arguments):
        raise TypeError("a bug")

    monkeypatch.setitem(COMMANDS, "eval", dataclasses.replace(COMMANDS["eval"], run=run))
    with pytest.raises(TypeError, match="a bug"):
        main(["eval"])


@pytest.mark.parametrize("command", ["import", "export", "merge", "combine"])
def test_what_an_interrupted_writer_has_left_is_what_is_there(command, tmp_path):
    left = COMMANDS[command].left
    arguments = parser().parse_args([command, "in", "--out", str(tmp_path / "out")])
    assert left(arguments) == "nothing was written"
    (tmp_path / "out").mkdir()
    assert left(arguments) == "nothing was written"
    (tmp_path / "out" / "a").touch()
    assert left(arguments) == f"{tmp_path / 'out'} is written"


STRANGER = """
import sys, time
from rslora_jax import cli
from rslora_jax.commands.command import Command
from rslora_jax.commands.progress import progress_line

def run(arguments):
    progress = progress_line("baking", after=0)
    for n in range(10**6):
        time.sleep(0.02)
        progress(n, 10**6)

cli.COMMANDS["bake"] = Command(name="bake", summary="bake", description="Bake.", examples=(("rslora bake", "A cake."),),
                               add_flags=lambda parser: None, run=run, left=lambda arguments: "there is half a cake")
sys.exit(cli.main(["bake"]))
"""


@pytest.mark.by_day_on("newest")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_terminal_is_left_as_it_was(kind):
    """Of a command that a stranger added: the cursor, which a bar hides, is back, and one line says how it ended."""
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "COLUMNS": "80",
        "TERM": "xterm",
        "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path),
    }
    run = subprocess.Popen([sys.executable, "-c", STRANGER], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said, sent = b"", False
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:
            break
        if not sent and b"baking" in said:
            sent = True
            run.send_signal(kind)
    assert run.wait(timeout=60) == 128 + kind, said
    assert said.rfind(b"\x1b[?25h") > said.rfind(b"\x1b[?25l") >= 0
    assert said.count(b"there is half a cake") == 1 and b"Traceback" not in said


@pytest.mark.by_day_on("oldest")
def test_a_reader_that_goes_ends_the_command_quietly():
    command = [sys.executable, "-m", "rslora_jax"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    ours, theirs = os.pipe()
    os.close(ours)
    run = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=environment, timeout=120)
    os.close(theirs)
    assert (run.returncode, run.stderr) == (141, b"")


def test_no_command_imports_the_command_line():
    for path in (ROOT / "commands").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            where = getattr(node, "module", None)
            assert "rslora_jax.cli" not in (where, *names) and (where != "rslora_jax" or "cli" not in names), path


def test_a_resumed_run_lies_where_the_file_of_settings_says(place, tmp_path):
    (tmp_path / "c.toml").write_text(f"out = {json.dumps(str(place.folder / 'one'))}\nrank = 9\nsteps = 70\n")
    command, arguments = parse(["train", "--config", str(tmp_path / "c.toml"), "--resume", "--heldout", "3"])
    assert isinstance(command, Command) and arguments.out == str(place.folder / "one")
    # The run's own settings go before the file's, and what is given before both.
    assert (arguments.max_len, arguments.heldout, arguments.steps) == (48, 3, 70)


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()
