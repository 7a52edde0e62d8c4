"""The script that reproduces the paper's figures: its order, and a tiny sweep from the command line to the table."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.by_day_on("newest")

SCRIPTS = Path(__file__).parent.parent / "scripts"


def grid(script, **changes):
    asked = {"ranks": [3, 5], "optimizers": ["sgd", "lion"], "scalings": ["lora", "rslora"], "seeds": 3}
    rates = {"sgd": [0.1, 0.2, 0.4], "lion": [1e-3]}
    return script.Grid(**{**asked, "rates": rates, **changes})


def trial(loss, diverged=None):
    return {"heldout_loss": loss, "train_loss": loss, "losses": [9.0], "diverged": diverged}


def test_every_rank_has_a_trial_before_any_has_two(script):
    specs = grid(script).specs()
    cells = [(s.optimizer, s.rank, s.scaling) for s in specs]
    assert len(set(cells[:8])) == 8 and {s.rate for s in specs[:8]} == {0.2, 1e-3}
    assert [s.rate for s in specs[8:16]] == [0.1, 0.1, 0.4, 0.4] * 2
    assert {s.seed for s in specs[:16]} == {0} and {s.seed for s in specs[16:32]} == {1}


def test_later_seeds_take_the_best_rate_of_the_first(script):
    asked = grid(script, ranks=[5], optimizers=["sgd"], scalings=["lora"])

    def spec(rate, seed=0):
        return script.Spec("sgd", 5, "lora", rate, seed)

    done = {spec(0.2): trial(2.0), spec(0.1): trial(1.5)}
    assert asked.left(done) == [spec(0.4), spec(0.2, 1), spec(None, 1), spec(0.2, 2), spec(None, 2)]
    done[spec(0.4)] = trial(1.0, diverged=7)
    assert asked.left(done) == [spec(0.2, 1), spec(0.1, 1), spec(0.2, 2), spec(0.1, 2)]
    assert asked.next_unit(done, 9) == asked.left(done)
    assert asked.next_unit(done, 3) == asked.left(done)[:3]
    done[spec(0.2)] = trial(1.2)
    assert asked.left(done) == [spec(0.2, 1), spec(0.2, 2)]


def test_a_unit_is_of_one_rank_and_optimiser_and_overtakes_none(script):
    asked, done = grid(script, ranks=[3, 5], optimizers=["sgd"]), {}
    units = []
    while unit := asked.next_unit(done, 3):
        units.append(unit)
        done |= {spec: trial(spec.rate) for spec in unit}
    assert all(len({(s.optimizer, s.rank) for s in unit}) == 1 and len(unit) <= 3 for unit in units)
    assert [(u[0].rank, len(u)) for u in units[:6]] == [(3, 2), (5, 2), (3, 3), (3, 1), (5, 3), (5, 1)]
    assert asked.left(done) == [] and len(done) == 2 * 2 * (3 + 2 * 2)


def test_the_table_has_means_over_seeds_of_the_best_rate(script):
    asked = grid(script, ranks=[5], optimizers=["sgd"], scalings=["rslora"])
    losses = {(0.1, 0): 1.0, (0.2, 0): 2.0, (0.1, 1): 1.3, (0.1, 2): 1.1, (0.2, 1): 0.5, (0.3, 0): 3.0}
    done = {script.Spec("sgd", 5, "rslora", rate, seed): trial(loss) for (rate, seed), loss in losses.items()}
    table = script.figures.table(asked, done)
    values = np.array([1.0, 1.3, 1.1])
    error = values.std(ddof=1) / math.sqrt(3)
    assert f"| 0.1* | {values.mean():.4f} ± {error:.4f} | 1.2500 ± 0.7500 | 3, 2 | 0 of 6 |" in table
    assert "at an edge" in table
    for worse, blown in ((10.01, 1), (9.99, 0)):  # it began with 9
        done[script.Spec("sgd", 5, "rslora", 0.2, 1)]["train_loss"] = worse
        assert f"| {blown} of 6 |" in script.figures.table(asked, done)


def test_a_unit_that_will_not_end_in_time_is_given_up(script, monkeypatch):
    clock = iter([100.0, 110.0, 120.0, 130.0, 140.0])
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    told = script.Teller(grid(script).specs()[:1], {}, grid(script), None, 200.0, None, None)
    told(1, 12)  # 10 s of compilation, then 10 s a step: step 12 would be done at 220
    told(2, 12)
    told(3, 12)
    with pytest.raises(script.OutOfTime):
        told(4, 12)


def test_what_is_done_when_time_is_over_is_kept(script):
    told = script.Teller(grid(script).specs()[:1], {}, grid(script), None, -math.inf, None, None)
    with pytest.raises(script.OutOfTime):
        told(1, 2)
    told(2, 2)


def report(script, out, docs):
    import paper_report

    docs.mkdir()
    shutil.copy(SCRIPTS.parent / "docs" / "paper" / "stability_fits.csv", docs)
    assert paper_report.main(["--from", str(out), "--docs", str(docs)]) == 0
    text = (docs / "README.md").read_text()
    assert "60 of 60 exponents agree" in text and "## Attention only" in text and "not measured yet" in text
    assert "B.5" in text and all((docs / name).is_file() for name in re.findall(r"\]\(([^)]+\.(?:png|csv))\)", text))
    rows = list(csv.DictReader((docs / "sweep-attention.csv").open()))
    trials = script.store.load(out / "trials.jsonl")
    assert len(rows) == len(trials) and (docs / "sweep-attention-rates-adamw.png").is_file()
    for row in rows:
        trial = trials[script.Spec("adamw", int(row["rank"]), row["scaling"], float(row["learning_rate"]), 0)]
        assert float(row["heldout_loss"]) == pytest.approx(trial["heldout_loss"], rel=1e-12)
        assert float(row["mean_factor_norm"]) == pytest.approx(np.mean(trial["factor_norms"]), rel=1e-12)
    shutil.rmtree(out)
    assert paper_report.main(["--docs", str(docs)]) == 0 and (docs / "README.md").read_text() == text
    assert paper_report.main(["--from", str(out), "--docs", str(docs)]) == 1


def test_a_smaller_start_is_the_usual_one_over_the_root_of_the_rank(script):
    import jax

    from rslora_jax.methods.random import uniform

    def draw(init):
        return init(jax.random.key(3), (4, 7, 6), "float32", 7)

    np.testing.assert_allclose(draw(script.smaller_by_rank), np.asarray(draw(uniform)) / math.sqrt(6), rtol=1e-6)
    assert script.GAMMAS["quarter"](16) == 0.5 and script.GAMMAS["square"](4) == 1 / 16


def test_a_tiny_sweep_goes_on_where_it_was_cut_and_leaves_figures(script, compile_fast, tmp_path, capsys):
    sums = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(9) for b in range(9)]
    data, out = tmp_path / "sums.jsonl", tmp_path / "out"
    data.write_text("\n".join(map(json.dumps, sums)))
    options = "--model tiny --ranks 5 --optimizers adamw --rates adamw=1e-3,1e-2 --seeds 1 --steps 5"
    argv = [
        *options.split(),
        "--batch-size",
        "2",
        "--max-len",
        "24",
        "--layers",
        "attention",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    assert script.main([*argv, "--budget", "0"]) == 0
    said = capsys.readouterr().out
    assert "Left out so far: 4 trials (adamw rank 5: 4)" in said and "the budget ended" in said

    assert script.main(argv) == 0
    said = capsys.readouterr().out
    assert "Nothing was left out" in said and "step 5/5" in said
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {(r["rank"], r["scaling"], r["learning_rate"]) for r in rows} == {
        ("5", scaling, rate) for scaling in ("rslora", "lora") for rate in ("0.001", "0.01")
    }
    kept = (out / "trials.jsonl").read_bytes()
    trials = script.store.load(out / "trials.jsonl")
    assert all(len(t["losses"]) == len(t["factor_norms"]) == 5 for t in trials.values()) and len(trials) == 4

    # At first B is zero, and its gradient is in proportion to gamma: sqrt(5) between the scalings at rank 5.
    def first(scaling):
        return trials[script.Spec("adamw", 5, scaling, 1e-3, 0)]["factor_norms"][0]

    assert first("rslora") / first("lora") == pytest.approx(math.sqrt(5), rel=1e-4)
    for name in ("perplexity-adamw.png", "gradients-adamw.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text().count("| adamw |") == 4
    assert script.main(argv) == 0 and (out / "trials.jsonl").read_bytes() == kept

    elsewhere = tmp_path / "elsewhere"
    start = tmp_path / "start.jsonl"
    start.write_bytes(b"".join(kept.splitlines(keepends=True)[:-1]))
    assert script.main([*argv, "--out", str(elsewhere), "--start", str(start), "--budget", "0"]) == 0
    assert "Left out so far: 1 trials" in capsys.readouterr().out
    assert (elsewhere / "trials.jsonl").read_bytes() == start.read_bytes()
    assert script.main([*argv, "--out", str(tmp_path / "other"), "--start", str(data)]) == 1
    assert "sums.jsonl is not the trials.jsonl of a sweep" in capsys.readouterr().err

    assert script.main([*argv, "--steps", "6"]) == 1
    assert "has trials of steps 5, and now it is 6" in capsys.readouterr().err
    report(script, out, tmp_path / "docs")
