"""`rslora train --resume`: what differs is refused in words of flags, before anything heavy is read."""

import json

import pytest

from rslora_jax.cli import main
from rslora_jax.commands import train as command
from tests.commands.conftest import SUMS

pytestmark = [pytest.mark.by_day_on("oldest"), pytest.mark.usefixtures("compile_fast")]
FLAGS = ["--steps", "2", "--rank", "3", "--alpha", "7", "--max-len", "48", "--heldout", "2", "--save-every", "1"]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A run of two steps on data of its own."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "mine.jsonl", SUMS[:20])
    start = ["train", "--model", str(place.folder / "model.gguf"), "--data", str(folder / "mine.jsonl")]
    assert main([*start, "--out", str(folder / "run"), *FLAGS]) == 0
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CASES = {
    "rank": (["--rank", "16"], "--rank 16 here, 3 was saved: leave it out to go on", False),
    "targets": (["--targets", "*/q_proj/*"], "--targets */q_proj/* here, all-linear was saved", False),
    "batch": (["--batch-size", "4"], "--batch-size 4 here, 2 was saved: leave it as it was", True),
    "accumulate": (["--accumulate", "2"], "--accumulate 2 here, 1 was saved", True),
    "seed": (["--seed", "1"], "--seed 1 here, 0 was saved", True),
    "max-len": (["--max-len", "32"], "--max-len 32 here, 48 was saved", True),
    "rate": (["--learning-rate", "0.01"], "--learning-rate 0.01 here, 0.001 was saved", True),
    "schedule": (["--schedule", "linear"], "--schedule linear here, cosine was saved", True),
    "option": (["--optimizer-option", "b1=0.8"], "--optimizer-option b1=0.8 here, none was saved", True),
    "heldout": (["--heldout", "1"], "--heldout 1 here, 2 was saved", True),
    "dtype": (["--dtype", "bfloat16"], "--dtype bfloat16 here, float32 was saved", True),
    "finished": ([], "is already at step 2: ask for more than 2 --steps", False),
    "no flag": (["--override", "lerning-rate"], "names no flag of `rslora train`; did you mean learning-rate?", False),
    "of the adapters": (["--override", "rank"], "the adapters are made with --rank, so start another run", False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_refused_in_words_of_flags_before_anything_is_read(trained, case, capsys, monkeypatch):
    flags, said, can = CASES[case]
    monkeypatch.setattr(command, "_open_start", lambda a: pytest.fail("it went on"))
    assert main(["train", "--resume", "--out", str(trained / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and ("--override" in error) == (can or case == "no flag" or case == "of the adapters")
    assert len(error) < 400


def test_other_examples_are_refused_before_the_model_is_read(trained, capsys, monkeypatch):
    monkeypatch.setattr(command, "_read_base", lambda *a: pytest.fail("it went on"))
    write(trained / "other.jsonl", SUMS[20:])
    resume = ["train", "--resume", "--out", str(trained / "run"), "--steps", "3"]
    assert main([*resume, "--data", str(trained / "other.jsonl")]) == 2
    assert f"other.jsonl holds other examples than {trained / 'mine.jsonl'}: leave it" in capsys.readouterr().err
    (trained / "c.toml").write_text("learning-rate = 0.5\n")
    assert main([*resume, "--config", str(trained / "c.toml")]) == 2
    assert "--learning-rate 0.5 here, 0.001 was saved" in capsys.readouterr().err
    write(trained / "mine.jsonl", [*SUMS[:19], {"question": "?", "answer": "!"}])
    try:
        assert main(resume) == 2
        assert "mine.jsonl holds out other examples than when the run was saved" in capsys.readouterr().err
    finally:
        write(trained / "mine.jsonl", SUMS[:20])


def test_what_is_overridden_is_taken_and_recorded(trained, capsys, place):
    (trained / "mine.jsonl").rename(trained / "moved.jsonl")  # the same examples elsewhere are the same
    flags = ["--steps", "3", "--learning-rate", "0.002", "--override", "learning-rate", "--heldout", "1"]
    flags += ["--override", "heldout", "--data", str(trained / "moved.jsonl")]
    assert main(["train", "--resume", "--out", str(trained / "run"), *flags]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    (changed,) = [line for line in lines if "changed" in line]
    assert changed["step"] == 2 and changed["new_heldout"] is True
    assert changed["changed"]["learning_rate"] == [0.001, 0.002] and changed["changed"]["steps"] == [2, 3]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 1, 2, 2, 3]
    assert lines[-2]["learning_rate"] > 0 and lines[-2]["epoch"] > 0
