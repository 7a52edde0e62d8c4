"""The script that compares methods and starts: a tiny run of it, from the command line to its table and figure."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_a_tiny_comparison_goes_on_where_it_was_cut_and_leaves_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_methods

    def run(*arguments):
        options = [
            "--model",
            "tiny",
            "--steps",
            "3",
            "--heldout",
            "4",
            "--max-len",
            "48",
            "--rank",
            "3",
            "--alpha",
            "5",
        ]
        return compare_methods.main([*options, "--kinds", "rsLoRA,PiSSA,full", "--out", str(tmp_path), *arguments])

    assert run("--budget", "0") == 0 and "runs or more are left" in capsys.readouterr().out
    assert run() == 0
    said = capsys.readouterr().out
    assert "12 of 12" in said
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines[1:]]
    assert len(runs) == 12 and all(len(of["losses"]) == 3 for of in runs)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["rsLoRA", "PiSSA", "full"]
    best = min(
        (of for of in runs if of["trial"]["kind"] == "PiSSA" and of["trial"]["seed"] == 0),
        key=lambda of: of["heldout_loss"],
    )
    assert f"{best['trial']['rate']:g}" in table[3] and f"{best['heldout_loss']:.4f}" in table[3]
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    assert run() == 0 and (tmp_path / "trials.jsonl").read_text().splitlines() == lines  # nothing is run again
    assert run("--time", "2") == 0 and json.loads((tmp_path / "times.json").read_text()).keys() == {
        "rsLoRA",
        "PiSSA",
        "full",
    }
    assert run("--steps", "4") == 1 and "is of steps 3, not 4: give another --out" in capsys.readouterr().err
