"""Every flag of every command, found in its parser: what it refuses, and that a file of settings obeys it too."""

import argparse
import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rslora_jax.cli import COMMANDS, main
from rslora_jax.commands.flags import Number
from rslora_jax.commands.settings import OF_A_CALL, file_settings


class Recorder:
    """A parser that keeps the actions of its flags, which argparse keeps for itself; nothing is required in it."""

    def __init__(self):
        self.parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        self.actions = []

    def add_argument(self, *names, **options):
        options.pop("required", None)
        positional = {} if names[0].startswith("-") else {"nargs": "?"}
        self.actions.append(self.parser.add_argument(*names, **options | positional))

    def add_argument_group(self, title):
        return self


def recorded(command):
    recorder = Recorder()
    COMMANDS[command].add_flags(recorder)
    return recorder


FLAGS = [(command, action) for command in COMMANDS for action in recorded(command).actions if action.option_strings]
NUMBERS = [
    (command, a) for command, a in FLAGS if isinstance(a.default, (int, float)) and not isinstance(a.default, bool)
]
# Flags of one call of the command alone, which no file may hold.
OF_TRAIN = [a for command, a in FLAGS if command == "train" and a.dest not in OF_A_CALL]


def given_by(command, words):
    """What a command line gives, or the sentence that refuses it; of flags that are required, nothing is asked."""
    try:
        return vars(recorded(command).parser.parse_args(words)), None
    except argparse.ArgumentError as error:
        return None, error.message


@pytest.mark.parametrize(("command", "action"), FLAGS, ids=[f"{c}{a.option_strings[0]}" for c, a in FLAGS])
def test_a_flag_has_a_range_or_choices_and_refuses_what_is_outside(command, action):
    flag = action.option_strings[0]
    if action.choices:
        assert given_by(command, [f"{flag}=no-{action.choices[0]}"])[1]
    if action.type in (int, float) or (command, action) in NUMBERS or isinstance(action.type, Number):
        assert isinstance(action.type, Number), "a flag that is a number says in which range it is"
        for text in ("nan", "inf", "-inf", "-5", "1e400", "9" * 400, "", "x", "0x10"):
            assert given_by(command, [f"{flag}={text}"])[1], text
        if action.default is not None:
            assert given_by(command, [f"{flag}={action.default}"])[0][action.dest] == action.default


VALUES = st.one_of(
    st.integers(-5, 300),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.sampled_from(
        ["float64", "float32", "bfloat16", "skpi", "skip", "stop", "cosine", "", "3", "a b", "-1", "--x", "ü"]
    ),
    st.lists(st.sampled_from(["b1=0.5", "x", "-y"]), max_size=3),
)


def as_toml(value):
    if isinstance(value, float):
        return "nan" if math.isnan(value) else ("-inf" if value < 0 else "inf") if math.isinf(value) else repr(value)
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("action", OF_TRAIN, ids=[a.option_strings[0] for a in OF_TRAIN])
@settings(max_examples=12, deadline=None)
@given(VALUES)
def test_a_file_of_settings_takes_what_the_command_line_takes_and_nothing_else(tmp_path_factory, action, value):
    flag = action.option_strings[0]
    path = tmp_path_factory.getbasetemp() / "settings.toml"
    path.write_text(f"{flag[2:]} = {as_toml(value)}\n", encoding="utf-8")
    start, _ = given_by("train", [])
    try:
        found = file_settings(argparse.Namespace(**{**start, "config": str(path)}))
    except ValueError as error:
        said = str(error)
        assert said.startswith(f"{path}: {flag[2:]} = ") and "\n" not in said
        if isinstance(value, bool | list) or "is not of the kind" in said:
            return  # of another kind than text on a command line has: refused for that
        assert given_by("train", [f"{flag}={value}"])[1]
        return
    if isinstance(value, bool):
        assert found == {action.dest: value}
        return
    words = [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    assert found == {action.dest: given_by("train", words)[0][action.dest]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('dtype = "float64"', "invalid choice: 'float64'"),
        ('on-nonfinite = "skpi"', "invalid choice: 'skpi'"),
        ("patience = -1", "-1 is not a whole number of at least 0"),
        ("heldout = -5", "-5 is not a whole number of at least 0"),
        ("steps = 2.5", "2.5 is not a whole number of at least 1"),
        ("learning-rate = nan", "nan is not a number above 0"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence_that_names_file_and_key(line, said, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(line + "\n")
    assert main(["train", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert (
        not out
        and err.startswith(f"rslora: error: {tmp_path / 'c.toml'}: {line.partition(' =')[0]} = ")
        and said in err
    ), err
