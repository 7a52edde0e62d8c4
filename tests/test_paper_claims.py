"""What is read off a sweep of ranks: exponents, maps, and the claims of the paper by their numbers."""

import dataclasses
import math

import numpy as np
import pytest

from tests.test_rank_sweep import grid

pytestmark = pytest.mark.by_day_on("newest")


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
