"""Names that users bring: of flags from other programs, of modules from PEFT, of settings in files of other shapes."""

import argparse
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rslora_jax import LoraConfig
from rslora_jax.cli import COMMANDS, main, parse
from rslora_jax.commands import habits
from rslora_jax.config import matches
from rslora_jax.module_names import with_globs
from rslora_jax.store import checkpoint
from tests.commands.conftest import SUMS

pytestmark = pytest.mark.by_day_on("newest")


def flags_of(command):
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_flags(parser)
    return re.findall(r"--[\w-]+", parser.format_usage())


def test_what_others_call_a_flag_is_that_flag_with_dashes_or_underscores():
    flags = flags_of("train")
    for theirs, ours in habits.SAME.items():
        assert f"--{theirs}" not in flags and f"--{ours}" in flags
        for name in (theirs, theirs.replace("-", "_")):
            assert habits.in_our_words([f"--{name}", "x"], flags) == [f"--{ours}", "x"]
            assert habits.in_our_words([f"--{name}=x"], flags) == [f"--{ours}=x"]
    for flag in flags:
        assert habits.in_our_words([flag.replace("-", "_").replace("__", "--")], flags) == [flag]


@pytest.mark.parametrize("name", habits.OTHERWISE)
def test_what_would_be_misread_is_refused_in_our_words(name, capsys):
    assert main(["train", f"--{name}", "4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rslora: error: --{name} is not of `rslora train`: ") and error.count("\n") == 1
    named = re.findall(r"--[a-z0-9-]+", error.partition("train`:")[2])
    assert named and set(named) <= set(flags_of("train"))


def test_names_of_others_are_read_to_the_same_arguments():
    theirs = "train --lr 3e-4 --lora_r 8 --target_modules q_proj,v_proj --max_seq_length 99 --num_train_epochs 2 --bf16"
    ours = "train --learning-rate 3e-4 --rank 8 --targets q_proj --targets v_proj --max-len 99 --epochs 2 --bf16"
    assert parse(theirs.split()) == parse(ours.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "run", "--rank", "3"], "`rslora generate` has no flag --rank; it is a flag of `rslora train`"),
        (["train", "--ranks", "3"], "`rslora train` has no flag --ranks; did you mean --rank?"),
        (["train", "--set", "rank"], "--set rank has no value: write it as --set rank=8"),
        (["train", "--set", "rnak=3"], "--set has rnak, which is no flag of `rslora train`; did you mean rank?"),
        (["train", "--set", "rank=many"], "--set: rank = 'many' is not of the kind that --rank takes"),
        (["train", "--epochs", "2", "--max_steps", "5"], "--epochs 2 and --steps 5 both say how long the run is"),
        (["train", "--epochs", "0"], "argument --epochs: 0 is not a number above 0"),
    ],
)
def test_what_is_no_flag_is_said(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


PART = st.sampled_from(["q_proj", "v_proj", "attn", "mlp", "layers_0", "q", "kernel", "bias", "w"])
PATHS = st.lists(st.lists(PART, min_size=1, max_size=4).map("/".join), min_size=1, max_size=6, unique=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(PATHS, st.lists(PART, min_size=1, max_size=2))
def test_a_name_is_of_the_modules_that_peft_would_take(paths, parts):
    # PEFT: a module's own name, or the end of it behind a dot. What is a leaf itself has its own name too.
    name = ".".join(parts)
    if name in paths:  # a path of the tree goes before a name of a module
        assert with_globs(LoraConfig(targets=name), paths).targets == name
        return
    want = set()
    for path in paths:
        for module in (path, path.rpartition("/")[0]):
            dotted = module.replace("/", ".")
            if dotted == name or dotted.endswith(f".{name}"):
                want.add(path)
    for field in ("targets", "exclude", "trained"):
        (glob,) = [
            g
            for of in [getattr(with_globs(LoraConfig(**{field: name}), paths), field)]
            for g in ([of] if isinstance(of, str) else of)
        ]
        assert {path for path in paths if matches(path, glob)} == want
    pattern = with_globs(LoraConfig(rank_pattern={name: 3}), paths).rank_pattern
    assert {path for path in paths if matches(path, pattern[0][0])} == want


def test_a_run_with_names_from_elsewhere(place, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS[:30]))
    (tmp_path / "run.yaml").write_text(
        "base_model: " + str(place.folder / "model.gguf") + "\n"
        "lora:\n  lora_r: 3\n  lora_alpha: 7\n  target_modules: [q_proj, mlp.down_proj]\n"
        "training:\n  learning_rate: 2e-3\n  max_seq_length: 64\n  rank-pattern:\n    down_proj: 2\n"
    )
    words = ["--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "run"), "--num_train_epochs", "1.5"]
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--set", "seed=5", "--set", "lr=1e-3", *words]) == 0
    said = capsys.readouterr().out
    rows = int(re.search(r"in (\d+) rows of 64", said)[1])
    steps = math.ceil(1.5 * rows / 2)
    assert f"1.5 epochs are {steps} steps" in said
    about = checkpoint.load_about(tmp_path / "run")
    kept = about["settings"]
    assert (kept["rank"], kept["alpha"], kept["seed"], kept["learning_rate"]) == (3, 7.0, 5, 1e-3)
    assert kept["steps"] == steps and kept["max_len"] == 64
    assert about["config"]["targets"] == ["*/q_proj/kernel", "*/mlp/down_proj/kernel"]
    ranks = dict(re.findall(r"^(params/\S+) +\d+ x \d+ +\d+ +(\d+) ", said, re.MULTILINE))
    assert ranks == {"params/layers/attn/q_proj/kernel": "3", "params/layers/mlp/down_proj/kernel": "2"}
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--epochs", "1"]) == 2
    assert f"is already at step {steps}" in capsys.readouterr().err
