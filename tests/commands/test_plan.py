"""`rslora train --plan` and `--accumulate auto`: what they say is what the run then is, and nothing is left behind."""

import json
import re

import pytest

from rslora_jax.cli import main
from rslora_jax.store import checkpoint
from rslora_jax.train import planning
from tests.commands.test_terminal import BAR, on_terminal

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
LINES = [
    *({"question": f"{n}+{n}=", "answer": f"It is.\n#### {2 * n}"} for n in range(30)),
    {"question": "long " * 20, "answer": "It is."},
    {"prompt": "p" * 30, "completion": "c" * 60},
    *({"question": f"{n}+{n}=", "answer": f"It is.\n#### {2 * n}"} for n in range(8)),
]
SHORT = ["--max-len", "48", "--heldout", "2", "--rank", "3", "--alpha", "7", "--batch-size", "4"]


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder with data of its own, in which commands run."""
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    monkeypatch.chdir(tmp_path)
    return ["train", "--model", str(place.folder / "model.gguf"), "--data", "mine.jsonl", *SHORT]


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def planned(monkeypatch):
    """Return a list of the plans that are made, as the command makes them."""
    import rslora_jax.train

    made, plan = [], rslora_jax.train.plan

    def kept(*args, **how):
        made.append(plan(*args, **how | {"seconds": 0}))
        return made[-1]

    monkeypatch.setattr(rslora_jax.train, "plan", kept)
    return made


def test_the_run_is_what_its_plan_said_and_the_plan_leaves_nothing_behind(here, tmp_path, monkeypatch, capsys):
    made, before = planned(monkeypatch), everything(tmp_path)
    flags = ["--steps", "7", "--accumulate", "2", "--eval-every", "3"]
    assert main([*here, *flags, "--plan"]) == 0
    said, (plan,) = capsys.readouterr().out, made
    assert everything(tmp_path) == before
    assert main([*here, *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "rslora-run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert plan.steps == len(steps) == 7 and plan.tokens.counted
    assert plan.tokens.learnt == sum(record["tokens"] for record in steps)
    assert plan.epochs == pytest.approx(steps[-1]["epoch"], abs=1e-4)
    assert plan.evaluations == len(records) - len(steps) == 4
    for record in steps:  # whose seconds are rounded
        assert record["tflops"] == pytest.approx(plan.flops / record["seconds"] / 1e12, rel=0.02, abs=2e-4)
    _, adapters = checkpoint.load_adapters(tmp_path / "rslora-run")
    assert sum(plan.trained.values()) == sum(leaf.size for each in adapters.values() for leaf in each.values())
    # As a reader sees it: the template, special tokens, what is learnt, and what is cut, by file and line.
    assert "mine.jsonl:1: 24 tokens, 14 with loss\n    <u>0+0=<a>⟦It is.⟧\n    ⟦#### 0<end>⟧" in said
    assert re.search(r"cut to fit a row: 2 of \d+ sequences\n  mine.jsonl:31 loses \d+ of its prompt\n", said)
    assert f"7 steps of 4 rows in 2 parts\n  {plan.epochs:.3g} epochs" in said and "(this run)" in said
    assert re.search(r"for a step of [\d.]+ MFLOP: [\d.]+ [MG]FLOP/s; compiled in", said)


KINDS = {
    "a start": ["--start", "pissa", "--steps", "2"],
    "new tokens": ["--new-tokens", "<tool>", "--steps", "2"],
    "auto": ["--accumulate", "auto", "--dropout", "0.1", "--optimizer", "lion"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_can_be_planned_and_is_not_begun(kind, here, tmp_path, monkeypatch, capsys):
    made, before = planned(monkeypatch), everything(tmp_path)
    assert main([*here, *KINDS[kind], "--plan", "--out", "deep/run"]) == 0
    assert everything(tmp_path) == before and made[0].fits and "about " in capsys.readouterr().out


def test_errors_are_those_of_the_run(here, tmp_path, capsys):
    before = everything(tmp_path)
    for flags in (["--accumulate", "3"], ["--accumulate", "outo"], ["--data", "none.jsonl"], ["--resume"]):
        said = []
        for more in ([], ["--plan"]):
            assert main([*here, *flags, *more]) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1] and said[0].count("\n") == 1
    assert everything(tmp_path) == before


def test_auto_takes_the_fewest_parts_that_fit_and_the_run_keeps_their_number(here, tmp_path, monkeypatch, capsys):
    made = planned(monkeypatch)
    assert main([*here, "--plan"]) == 0
    limit = int(made[0].memory.total / 0.9) - 10  # which the whole batch just misses
    monkeypatch.setattr(planning, "room", lambda: limit)
    assert main([*here, "--accumulate", "auto", "--steps", "1"]) == 0
    assert "--accumulate auto: each batch of 4 is taken in 2" in capsys.readouterr().out
    assert checkpoint.load_about(tmp_path / "rslora-run")["settings"]["accumulate"] == 2
    assert main(["train", "--resume", "--steps", "2", "--out", "rslora-run", "--plan"]) == 0
    assert made[-1].done == 1 and made[-1].parts == 2
    assert "1 step of 4 rows in 2 parts, after 1 done before" in capsys.readouterr().out


def test_on_a_terminal_what_is_learnt_is_in_colour(here, monkeypatch):
    planned(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    with on_terminal(monkeypatch) as screen:
        assert main([*here, "--plan"]) == 0
    said = screen.getvalue()
    assert "<u>0+0=<a>\x1b[32mIt is.\x1b[0m\n" in said and "⟦" not in said
    assert max(map(len, BAR.sub("", said[said.index("data\n") :]).splitlines())) <= 80


def test_a_file_of_settings_may_say_auto(here, tmp_path, capsys):
    (tmp_path / "some.toml").write_text('accumulate = "auto"\n')
    assert main([*here, "--config", "some.toml", "--plan", "--data", "none.jsonl"]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    (tmp_path / "some.toml").write_text("plan = true\n")
    assert main([*here, "--config", "some.toml"]) == 2
    assert "plan, which is no flag" in capsys.readouterr().err
