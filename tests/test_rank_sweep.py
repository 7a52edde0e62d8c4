"""The script that reproduces the paper's figures: its order, and a tiny sweep from the command line to the table."""

import csv
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.by_day_on("newest")

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import rank_sweep

    return rank_sweep


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


def measured(losses_by_rate_and_rank, scaling="rslora", **more):
    """Make trials of AdamW and one seed from {rank: {rate: held-out loss}}."""
    from paper.plan import Spec

    def trial(loss):
        return {"diverged": None, "heldout_loss": loss, "train_loss": loss, "losses": [9.5], **more}

    return {
        Spec("adamw", rank, scaling, rate, 0): trial(loss)
        for rank, losses in losses_by_rate_and_rank.items()
        for rate, loss in losses.items()
    }


def test_the_exponent_of_best_rates_is_found_between_the_rates_tried(script):
    rates, ranks = [1e-4, 1e-3, 1e-2, 1e-1], [2, 5, 17, 60]

    def bowl(rank, rate):
        return 3 + 0.05 * math.log(rate / (0.02 * rank**-0.4)) ** 2

    done = measured({rank: {rate: bowl(rank, rate) for rate in rates} for rank in ranks})
    asked = grid(script, ranks=ranks, optimizers=["adamw"], scalings=["rslora"], rates={"adamw": rates})
    best = script.maps.best_rates(asked, done, "adamw", "rslora")
    assert [best[rank].rate for rank in ranks] == pytest.approx([0.02 * rank**-0.4 for rank in ranks], rel=1e-9)
    fit = script.maps.fitted(best)
    assert fit.slope == pytest.approx(-0.4, abs=1e-9) and fit.high - fit.low < 1e-9
    assert "| -0.40 (-0.40, -0.40) | -0.25 |" in script.maps.rate_table(asked, done)
    spec = next(s for s in done if s.rank == 60 and s.rate == 1e-3)
    # The neighbour of the least blew up: nothing is read off a parabola.
    for blown in ({"diverged": 3}, {"diverged": None, "heldout_loss": bowl(60, 1e-2) + 1.01}):
        done[spec] |= blown
        assert script.maps.best_rates(asked, done, "adamw", "rslora")[60].rate == 1e-2
    del done[spec]
    assert script.maps.best_rates(asked, done, "adamw", "rslora")[60].rate < 1e-2  # between 1e-4 and 1e-1 still
    del done[dataclasses.replace(spec, rate=1e-1)]
    assert 60 not in script.maps.best_rates(asked, done, "adamw", "rslora")


def test_one_rate_for_all_ranks_is_read_off_the_map(script):
    from paper import transfer

    def bowl(rank, rate):
        return 2 + math.log10(rate / (1e-3 * (rank / 8) ** -0.25)) ** 2

    rates = [1e-4, 1e-3, 1e-2]
    done = measured({rank: {rate: bowl(rank, rate) for rate in rates} for rank in (8, 128)})
    table = transfer.transfer_table(done, {})
    assert "best for rsLoRA of rank 8 is 0.001" in table[0]

    def line(at):
        return bowl(128, 1e-4) + (bowl(128, 1e-3) - bowl(128, 1e-4)) * at

    halved = 1 - math.log10(2)  # 128 is 16 times 8
    assert f"| 128 | 0.001 | {bowl(128, 1e-3):.4f} | ~{line(1):.4f} | 0.0005 | ~{line(halved):.4f} |" in table
    assert transfer.transfer_table({}, {}) == []
    trained = measured({128: {0.000502: 1.25, 0.0009: 7.0}})
    assert any("| 0.0005 | 1.2500 |" in row and "~" in row for row in transfer.transfer_table(done, trained))
    assert "Trained at both" not in str(transfer.transfer_table(done, trained))
    for seed, loss in enumerate((1.5, 1.4, 1.9)):
        both = measured({128: {0.0005: loss - 0.25 + seed / 10, 0.001: loss}})
        trained |= {dataclasses.replace(spec, seed=seed): trial for spec, trial in both.items()}
    said = "Trained at both, rank 128 ends by the rule at 1.4500 and at the one rate at 1.6000, a difference of -0.1500"
    assert f"{said} ± {0.1 / math.sqrt(3):.4f} (3 seeds).\n" in transfer.transfer_table(done, trained)


def test_the_interval_of_an_exponent_is_students(script):
    from paper.rates import exponent

    ranks, rates = np.array([2.0, 4, 8, 16]), np.array([1.0, 2.2, 3.7, 8.4])
    slope, covariance = np.polyfit(np.log(ranks), np.log(rates), 1, cov="unscaled")
    left = np.log(rates) - np.polyval(slope, np.log(ranks))
    error = math.sqrt(covariance[0, 0] * (left @ left) / 2)
    fit = exponent(ranks, rates)
    assert (fit.slope, fit.high - fit.slope) == pytest.approx((slope[0], 4.303 * error), rel=1e-3)


def test_claims_are_judged_by_the_numbers(script):
    from paper import claims

    def rates(loss):
        return {0.01: 3.0, 0.1: loss, 1.0: 3.0}

    better, same = {2: rates(2.0), 8: rates(1.5)}, {2: rates(2.0), 8: rates(1.991)}
    done = measured(better) | measured(same, "lora")
    row = claims.improves(done, "adamw", "")
    assert row.verdict == "at 0.01: no, of one seed; at 0.1: yes, of one seed; at 1: no, of one seed"
    assert "at rate 0.1 from r = 2 to 8 the training loss changes by -0.5000" in row.measured
    assert claims.improves(measured({2: {0.1: 2.0}, 8: {0.1: 1.5}}), "adamw", "").verdict == "yes, of one seed"
    assert claims.improves(measured({2: {0.1: 2.0}, 8: {0.1: 2.5}}), "adamw", "").verdict == "no, of one seed"
    row = claims.coincides(done, "adamw", "")  # 0.9 % of the perplexity
    assert row.verdict == "yes" and "rsLoRA's training losses span 0.5000 over 2 ranks (2.000 at r = 2" in row.measured
    apart = measured(better) | measured({2: rates(2.0), 8: rates(1.989)}, "lora")
    assert claims.coincides(apart, "adamw", "").verdict == "no" and "(1 seed)" in row.measured
    assert claims.best_of_all(done, "adamw", "").verdict == "yes, of one seed"
    sgd = {dataclasses.replace(spec, optimizer="sgd"): trial for spec, trial in done.items()}
    for claim in (claims.best_of_all, claims.at_own_best):
        assert claim(sgd, "sgd", "").verdict == "yes, of one seed"
        assert claim(sgd, "adamw", "").measured == claims.UNMEASURED
    done = measured(same) | measured(better, "lora")
    assert claims.coincides(done, "adamw", "").verdict == "no"
    assert claims.best_of_all(done, "adamw", "").verdict == "no, of one seed"
    assert claims.improves({}, "adamw", "").measured == claims.UNMEASURED
    one_rate = measured({2: {0.1: 2.0}, 8: {0.1: 1.5}}) | measured({2: {0.1: 2.0}, 8: {0.1: 1.9}}, "lora")
    from paper.plan import Spec
    from paper.rates import common_rate

    # Where the least rank has blown up, nothing is to be compared: that is no gain of the larger one.
    blown = measured({2: {0.01: 2.0, 0.1: 2.0, 1.0: 30.0}, 8: {0.01: 2.1, 0.1: 2.1, 1.0: 2.0}})
    blown |= measured({2: {0.01: 2.0, 0.1: 12.0, 1.0: 30.0}, 8: {0.01: 2.0, 0.1: 2.0, 1.0: 2.0}}, "lora")
    assert common_rate(blown, "adamw") == 0.01
    noise = measured({2: {0.01: 2.0, 0.1: 10.0, 1.0: 10.6}, 8: {0.01: 2.0, 0.1: 2.0, 1.0: 2.0}})
    assert common_rate(noise, "adamw") == 0.01 and common_rate(measured({2: {0.1: 30.0}}), "adamw") == 0.1
    assert common_rate(measured({2: {0.01: 2.0, 0.1: 10.0, 0.2: 2.0}}), "adamw") == 0.1  # batches differ by as much
    blown |= {
        dataclasses.replace(spec, seed=1): trial for spec, trial in measured({2: {2.0: 30.0}, 8: {2.0: 2.0}}).items()
    }
    row = claims.improves(blown, "adamw", "")
    assert row.verdict == "no, of one seed" and "at rate 0.1 " in row.measured
    assert "at rate 1 " not in row.measured and "at rate 2 " not in row.measured
    done[Spec("adamw", 2, "lora", 0.1, 1)] = {"diverged": None, "heldout_loss": 9.0, "train_loss": 9.0}
    assert "span 0.5000" in claims.coincides(done, "adamw", "").measured  # a seed that one rank alone has is left out
    assert (
        claims.best_of_all(one_rate, "adamw", "").measured
        == claims.at_own_best(one_rate, "adamw", "").measured
        == claims.UNMEASURED
    )
    for worse in (0.1, 10.0):
        norms = measured({2: {0.1: 1.0}}, "lora", mean_factor_norm=1.0)
        norms |= measured({8: {0.1: 1.0}}, "lora", mean_factor_norm=worse)
        row = claims.norms(norms, "adamw", "lora", "", collapse=True)
        assert row.verdict == ("yes" if worse < 1 else "no") and "(1 seed)" in row.measured


def test_seeds_are_compared_in_pairs_beyond_two_standard_errors(script):
    from paper import claims

    def seeds(losses, by, scaling):
        """Each seed's losses are moved by as much for all ranks, and the last rank's by its own `by`."""
        done = {}
        for seed, (shift, own) in enumerate(zip((0.0, 0.7, -0.4), by, strict=True)):
            moved = {r: {k: x + shift + own * (r == 8) for k, x in rates.items()} for r, rates in losses.items()}
            done |= {dataclasses.replace(s, seed=seed): t for s, t in measured(moved, scaling).items()}
        return done

    def bowl(least):
        return {0.01: 3.0, 0.1: least, 1.0: 3.0}

    lora = seeds({2: bowl(2.0), 8: bowl(2.0)}, (0.0, 0.0, 0.0), "lora")
    for by, verdict in (
        ((-0.3, -0.2, -0.25), "yes"),
        ((0.3, 0.2, 0.25), "no"),
        ((-0.4, -0.3, 0.1), "undecided: within two standard errors"),
    ):
        done = lora | seeds({2: bowl(2.0), 8: bowl(2.0)}, by, "rslora")
        mean, error = np.mean(by), np.std(by, ddof=1) / math.sqrt(3)
        for row in (claims.best_of_all(done, "adamw", ""), claims.at_own_best(done, "adamw", "")):
            assert row.verdict == verdict and f"{mean:+.4f} ± {error:.4f}" in row.measured and "3 seeds" in row.measured
        assert claims.improves(done, "adamw", "").verdict == verdict


def test_other_scales_are_judged_at_the_largest_rank_they_have(script, tmp_path):
    from paper import claims

    def rows(**held):
        return {k: v for name, loss in held.items() for k, v in measured({8: {0.1: loss}}, name).items()}

    found = claims.other_exponents(rows(rslora=1.5, quarter=2.5, square=3.0))
    assert found.verdict == "yes, of one seed"
    assert "1.5000 with r^-1/2, 2.5000 with r^-1/4 (+1.0000), 3.0000 with r^-2 (+1.5000) (1 seed)" in found.measured
    assert claims.other_exponents(rows(rslora=1.5, quarter=1.4, square=3.0)).verdict == "no, of one seed"
    assert claims.other_exponents(rows(rslora=1.5, quarter=2.5)).measured == claims.UNMEASURED
    for first, last, held, verdict in ((1.0, 1.1, 2.5, "yes"), (1.0, 3.0, 2.5, "no"), (1.0, 1.1, 1.9, "no")):
        done = measured({2: {0.1: 2.0}}, "init-only", first_factor_norm=first)
        done |= measured({8: {0.1: held}}, "init-only", first_factor_norm=last)
        assert claims.init_only(done).verdict == f"{verdict}, of one seed"

    def of(losses):
        return measured(losses, "init-only", first_factor_norm=1.0)

    def several(seeds):
        return {dataclasses.replace(s, seed=n): t for n, done in enumerate(seeds) for s, t in done.items()}

    for quarter, verdict in (((2.5, 2.9, 2.7), "yes"), ((1.2, 1.3, 1.1), "no"), ((1.7, 1.0, 2.1), "undecided")):
        done = several([rows(rslora=1.5 + n, quarter=q + n, square=3.0 + n) for n, q in enumerate(quarter)])
        mean, error = np.mean(quarter) - 1.5, np.std(quarter, ddof=1) / math.sqrt(3)
        found = claims.other_exponents(done)
        assert found.verdict.split(":")[0] == verdict and f"({mean:+.4f} ± {error:.4f})" in found.measured
        done |= several([of({2: {0.1: 1.5 + n}}) for n in range(4)])
        done |= several([of({8: {0.1: q + n}}) for n, q in enumerate(quarter)])
        found = claims.init_only(done)
        assert found.verdict.split(":")[0] == verdict
        assert f"2.500 at r = 2, {np.mean(quarter) + 1:.3f} at r = 8" in found.measured and "3 seeds" in found.measured

    curves = {"losses": [9.0, 8.0, 7.0], "factor_norms": [0.3, 0.2, 0.1]}
    done = {spec: trial | curves for spec, trial in rows(rslora=1.5, quarter=2.5).items()}
    asked = grid(script, ranks=[8], optimizers=["adamw"], scalings=["rslora", "quarter"], rates={"adamw": [0.1]})
    files = [file.name for file in script.maps.draw_all(f"{tmp_path}/", asked, done)]
    assert files == ["scales-adamw.png", "perplexity-adamw.png", "gradients-adamw.png", "loss-by-rank.png"]


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


def test_a_line_of_losses_is_over_the_seeds_that_all_its_ranks_have(script):
    line = script.maps.line
    three, two = {0: 1.0, 1: 3.0, 2: 50.0}, {0: 5.0, 1: 5.0}
    assert line({4: three, 8: two, 32: {}}) == ([4, 8], [2.0, 5.0], [1.0, 0.0])
    assert line({4: {0: 1.0}, 8: {1: 1.0}}) == line({}) == ([], [], [])


def test_the_common_rate_is_one_that_all_ranks_have(script):
    from paper.rates import common_rate

    done = measured({2: {0.01: 2.0, 0.1: 2.0, 1.0: 30.0}, 8: {0.1: 2.0, 0.2: 2.0, 0.4: 2.0, 1.0: 2.0}})
    assert common_rate(done, "adamw") == 0.1  # 1.0 blows up, 0.2 and 0.4 are of one rank alone
    assert common_rate(done | measured({2: {0.2: 2.0}}), "adamw") == 0.1
    assert common_rate(done | measured({2: {0.05: 2.0}, 8: {0.05: 2.0}}), "adamw") == 0.05
    assert common_rate(measured({8: {0.3: 2.0}}, "quarter"), "adamw") == 0.3
