"""The claims of arXiv 2312.03732, each with what was measured of it here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from paper.plan import Spec
from paper.rates import common_rate, exploded, exponent
from paper.store import mean_and_error

Done = Mapping[Spec, Mapping[str, Any]]


class Row(NamedTuple):
    """A claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    verdict: str


def all_claims(fits: Sequence[Mapping[str, str]], sweeps: Mapping[str, Done]) -> list[Row]:
    """Return a row for each claim."""
    done, attention = sweeps["all"], sweeps["attention"]
    return [
        theorem(fits),
        improves(done, "adamw", "Fig. 2: at one learning rate rsLoRA gets better with the rank (AdamW)"),
        coincides(done, "adamw", "Fig. 2: LoRA's ranks coincide (AdamW)"),
        norms(done, "adamw", "lora", "Fig. 3: LoRA's gradient norm collapses with the rank (AdamW)", collapse=True),
        norms(done, "adamw", "rslora", "Fig. 3: rsLoRA's stays within an order of magnitude (AdamW)", collapse=False),
        best_of_all(done),
        improves(done, "sgd", "B.1: the same with SGD: rsLoRA gets better with the rank"),
        coincides(done, "sgd", "B.1: the same with SGD: LoRA's ranks coincide"),
        norms(done, "sgd", "lora", "B.1: LoRA's gradient norm collapses with SGD", collapse=True),
        improves(done, "adafactor", "B.2: the same with Adafactor (GPT-J there): rsLoRA gets better with the rank"),
        init_only(done),
        improves(attention, "adamw", "B.5: the same with adapters on attention only"),
        other_exponents(done),
        at_own_best(done),
    ]


def several_rates(done: Done, optimizer: str) -> bool:
    """Say whether each rank and scaling has a least loss between rates: three of them, at least."""
    rates: dict[tuple[int, str], set[float | None]] = {}
    for spec in done:
        if spec.optimizer == optimizer and spec.seed == 0 and spec.scaling in ("rslora", "lora"):
            rates.setdefault((spec.rank, spec.scaling), set()).add(spec.rate)
    return bool(rates) and all(len(tried) >= 3 for tried in rates.values())


def by_rank(done: Done, optimizer: str, scaling: str, rate: float | None, key: str) -> dict[int, dict[int, float]]:
    """Return a number of the trials at one rate, by rank and seed; infinite where a trial diverged."""
    found: dict[int, dict[int, float]] = {}
    for spec, trial in sorted(done.items(), key=lambda item: item[0].rank):
        if (spec.optimizer, spec.scaling, spec.rate) == (optimizer, scaling, rate):
            bad = trial["diverged"] is not None
            found.setdefault(spec.rank, {})[spec.seed] = math.inf if bad else trial[key]
    return found


def means_by_rank(found: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    """Return the mean by rank over the seeds that all ranks have: a seed has its own batches, and so its own loss."""
    seeds = set.intersection(*map(set, found.values())) if found else set()
    return {rank: float(np.mean([values[s] for s in sorted(seeds)])) for rank, values in found.items() if seeds}


def change(found: Mapping[int, Mapping[int, float]]) -> tuple[float, float, int, int, int] | None:
    """Return (mean over seeds of the last rank's number less the first's, its error, seeds, first, last rank)."""
    if len(found) < 2:
        return None
    low, high = min(found), max(found)
    seeds = sorted(found[low].keys() & found[high].keys())
    if not seeds:
        return None
    mean, error = mean_and_error([found[high][s] - found[low][s] for s in seeds])
    return mean, error, len(seeds), low, high


UNMEASURED = "not measured yet"


def improves(done: Done, optimizer: str, claim: str) -> Row:
    """rsLoRA's training loss falls from the least rank to the largest, at each rate at which the least learns."""
    said, judged_by_rate, sure = [], {}, True
    for rate in sorted({s.rate for s in done if (s.optimizer, s.scaling) == (optimizer, "rslora") and s.rate}):
        found = change(by_rank(done, optimizer, "rslora", rate, "train_loss"))
        held = change(by_rank(done, optimizer, "rslora", rate, "heldout_loss"))
        if not found or not held:
            continue
        mean, error, seeds, low, high = found
        least = [
            t for s, t in done.items() if (s.optimizer, s.rank, s.scaling, s.rate) == (optimizer, low, "rslora", rate)
        ]
        if any(map(exploded, least)):
            continue
        one_seed = math.isnan(error)
        said.append(
            f"at rate {rate:g} from r = {low} to {high} the training loss changes by {signed(mean, error)}, "
            f"the held-out loss by {signed(*held[:2])} ({seeds} seed{'s' * (seeds > 1)})"
        )
        judged_by_rate[rate] = mean < (0 if one_seed else -2 * error)
        sure &= not one_seed
    if not said:
        return Row(claim, UNMEASURED, "–")
    holds = [f"{rate:g}" for rate, held_there in judged_by_rate.items() if held_there]
    verdict = "yes" if len(holds) == len(said) else f"at rate {', '.join(holds)}, not at the others" if holds else "no"
    return Row(claim, "; ".join(said), verdict + ("" if sure else ", of one seed"))


def coincides(done: Done, optimizer: str, claim: str) -> Row:
    """LoRA's losses differ over the ranks by less than a third of what rsLoRA's do."""
    rate = common_rate(done, optimizer)
    spread, ends = {}, {}
    for scaling in ("lora", "rslora"):
        means = means_by_rank(by_rank(done, optimizer, scaling, rate, "train_loss"))
        if len(means) < 2:
            return Row(claim, UNMEASURED, "–")
        spread[scaling] = max(means.values()) - min(means.values())
        ends[scaling] = ", ".join(f"{means[rank]:.3f} at r = {rank}" for rank in (min(means), max(means)))
    ours, theirs = spread["rslora"], spread["lora"]
    measured = (
        f"at rate {rate:g} LoRA's training losses span {theirs:.4f} over the ranks ({ends['lora']}), rsLoRA's "
        f"{ours:.4f} ({ends['rslora']})"
    )
    return Row(claim, measured, "yes" if 3 * theirs < ours else "no")


def norms(done: Done, optimizer: str, scaling: str, claim: str, *, collapse: bool) -> Row:
    """The mean gradient norm of a factor over the run, by rank."""
    found = by_rank(done, optimizer, scaling, common_rate(done, optimizer), "mean_factor_norm")
    means = means_by_rank(found)
    if len(means) < 2:
        return Row(claim, UNMEASURED, "–")
    first, last = means[min(means)], means[max(means)]
    fit = exponent(list(means), list(means.values()))
    times = max(means.values()) / min(means.values())
    measured = f"{first:.3g} at r = {min(means)}, {last:.3g} at r = {max(means)}: like r^{fit.slope:.2f}" if fit else ""
    holds = fit is not None and fit.slope < -0.25 and last < first if collapse else times < 10
    return Row(claim, measured, "yes" if holds else "no")


def best_of_all(done: Done) -> Row:
    """rsLoRA at its best rank and rate against LoRA at its own."""
    claim = "B.4: the best rsLoRA of a high rank is better than the best LoRA of any rank and rate (AdamW)"
    if not several_rates(done, "adamw"):
        return Row(claim, UNMEASURED, "–")
    least: dict[str, tuple[float, Spec]] = {}
    for spec, trial in done.items():
        if spec.optimizer == "adamw" and spec.seed == 0 and trial["diverged"] is None:
            found = (trial["heldout_loss"], spec)
            if spec.scaling not in least or found[0] < least[spec.scaling][0]:
                least[spec.scaling] = found
    if not {"rslora", "lora"} <= set(least):
        return Row(claim, UNMEASURED, "–")
    (ours, at), (theirs, where) = least["rslora"], least["lora"]
    measured = (
        f"held-out {ours:.4f} (rsLoRA, r = {at.rank}, rate {at.rate:g}) against {theirs:.4f} (LoRA, r = {where.rank}, "
        f"rate {where.rate:g}), one seed"
    )
    return Row(claim, measured, "yes, of one seed" if ours < theirs and at.rank >= where.rank else "no")


def init_only(done: Done) -> Row:
    claim = (
        "B.3: scaling only A's start by 1/sqrt(r) gives equal gradient norms at first, then instability at high rank"
    )
    rate = common_rate(done, "adamw")
    first = by_rank(done, "adamw", "init-only", rate, "first_factor_norm")
    held = by_rank(done, "adamw", "init-only", rate, "heldout_loss")
    if len(first) < 2:
        return Row(claim, UNMEASURED, "–")
    norms = {rank: float(np.mean(list(v.values()))) for rank, v in first.items()}
    losses = ", ".join(f"{np.mean(list(v.values())):.3f} at r = {rank}" for rank, v in held.items())
    equal = max(norms.values()) / min(norms.values())
    worse = change(held)
    holds = equal < 2 and worse is not None and worse[0] > 0
    return Row(claim, f"first norms within {equal:.2f}x of each other; held-out {losses}", "yes" if holds else "no")


def other_exponents(done: Done) -> Row:
    claim = "B.6: at high rank r^-1/4 is unstable and r^-2 learns nothing"
    rate = common_rate(done, "adamw")
    said, held = [], {}
    for scaling, name in (("rslora", "r^-1/2"), ("quarter", "r^-1/4"), ("square", "r^-2")):
        found = by_rank(done, "adamw", scaling, rate, "heldout_loss")
        if not found:
            return Row(claim, UNMEASURED, "–")
        held[scaling] = float(np.mean(list(found[max(found)].values())))
        said.append(f"{held[scaling]:.4f} with {name}")
    holds = held["quarter"] > held["rslora"] < held["square"]
    rank = max(s.rank for s in done if s.scaling == "quarter")
    return Row(claim, f"held-out at r = {rank}: {', '.join(said)}", "yes" if holds else "no")


def at_own_best(done: Done) -> Row:
    """The caution: under Adam the first change of the output grows like gamma lr r."""
    claim = "Caution on AdamW (not the paper's): at each rank's own best rate, is a high rank still better?"
    found = {}
    for spec, trial in done.items():
        if (spec.optimizer, spec.scaling, spec.seed) == ("adamw", "rslora", 0) and trial["diverged"] is None:
            found[spec.rank] = min(found.get(spec.rank, math.inf), trial["heldout_loss"])
    if len(found) < 2 or not several_rates(done, "adamw"):
        return Row(claim, UNMEASURED, "–")
    listed = ", ".join(f"{found[rank]:.4f} at r = {rank}" for rank in sorted(found))
    better = found[max(found)] < found[min(found)]
    return Row(
        claim, f"rsLoRA's least held-out losses: {listed}, one seed", f"{'yes' if better else 'no'}, of one seed"
    )


def signed(mean: float, error: float) -> str:
    return f"{mean:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def theorem(fits: Sequence[Mapping[str, str]]) -> Row:
    claim = (
        "Theorem 3.2: outputs like (gamma² r)^m, gradients of inputs like gamma² r; stable only for gamma ~ 1/sqrt(r)"
    )
    gaps = [abs(float(fit["measured"]) - float(fit["theory"])) for fit in fits]
    agree = sum(fit["agrees"] == "True" for fit in fits)
    measured = f"{agree} of {len(fits)} exponents agree, the furthest by {max(gaps):.3f} ([all](stability_fits.csv))"
    return Row(claim, measured, "yes" if agree == len(fits) else "no")
