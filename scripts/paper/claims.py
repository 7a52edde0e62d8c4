"""The claims of arXiv 2312.03732, each with what was measured of it here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from paper.plan import Spec
from paper.rates import common_rate, exploded, exponent, losses_by_rate
from paper.store import common_seeds, mean_and_error

Done = Mapping[Spec, Mapping[str, Any]]

BEST = "the best rsLoRA of a high rank is better than the best LoRA of any rank and rate"
OWN = "at each rank's own best rate, is a high rank still better?"


class Row(NamedTuple):
    """A claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    verdict: str


def all_claims(
    fits: Sequence[Mapping[str, str]], sweeps: Mapping[str, Done], activations: Sequence[Mapping[str, str]]
) -> list[Row]:
    """Return a row for each claim."""
    done, attention = sweeps["all"], sweeps["attention"]
    return [
        theorem(fits),
        improves(done, "adamw", "Fig. 2: at one learning rate rsLoRA gets better with the rank (AdamW)"),
        coincides(done, "adamw", "Fig. 2: LoRA's ranks coincide (AdamW)"),
        norms(done, "adamw", "lora", "Fig. 3: LoRA's gradient norm collapses with the rank (AdamW)", collapse=True),
        norms(done, "adamw", "rslora", "Fig. 3: rsLoRA's stays within an order of magnitude (AdamW)", collapse=False),
        best_of_all(done, "adamw", f"B.4: {BEST} (AdamW)"),
        improves(done, "sgd", "B.1: the same with SGD: rsLoRA gets better with the rank"),
        coincides(done, "sgd", "B.1: the same with SGD: LoRA's ranks coincide"),
        norms(done, "sgd", "lora", "B.1: LoRA's gradient norm collapses with SGD", collapse=True),
        best_of_all(done, "sgd", f"B.4 with SGD: {BEST}"),
        improves(done, "adafactor", "B.2: the same with Adafactor (GPT-J there): rsLoRA gets better with the rank"),
        coincides(done, "adafactor", "B.2: LoRA's ranks coincide with Adafactor"),
        norms(done, "adafactor", "lora", "B.2: LoRA's gradient norm collapses with Adafactor", collapse=True),
        init_only(done),
        improves(attention, "adamw", "B.5: the same with adapters on attention only: rsLoRA gets better with the rank"),
        coincides(attention, "adamw", "B.5: LoRA's ranks coincide on attention only"),
        other_exponents(done),
        moments(activations),
        at_own_best(done, "adamw", f"Caution on AdamW (not the paper's): {OWN}"),
        at_own_best(done, "sgd", f"The same with SGD: {OWN}"),
        improves(sweeps["docstrings"], "adamw", "Fig. 2 on other data, docstrings of Python: rsLoRA gets better"),
        coincides(sweeps["docstrings"], "adamw", "Fig. 2 on other data, docstrings of Python: LoRA's ranks coincide"),
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
    """Return the mean by rank over the seeds that all ranks have."""
    seeds = common_seeds(found)
    return {rank: float(np.mean([values[s] for s in seeds])) for rank, values in found.items() if seeds}


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
    said, verdicts = [], []
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
        said.append(
            f"at rate {rate:g} from r = {low} to {high} the training loss changes by {signed(mean, error)}, "
            f"the held-out loss by {signed(*held[:2])} ({count_seeds(seeds)})"
        )
        verdicts.append((f"{rate:g}", judged(mean, error)))
    if not said:
        return Row(claim, UNMEASURED, "–")
    alike = len({verdict for _, verdict in verdicts}) == 1
    listed = verdicts[0][1] if alike else "; ".join(f"at {rate}: {verdict}" for rate, verdict in verdicts)
    return Row(claim, "; ".join(said), listed)


def coincides(done: Done, optimizer: str, claim: str) -> Row:
    """LoRA's training perplexities are within 1 % over the ranks; beside them, how far apart rsLoRA's are."""
    rate = common_rate(done, optimizer)
    spread, said, counts = {}, [], []
    for scaling, name in (("lora", "LoRA's"), ("rslora", "rsLoRA's")):
        found = by_rank(done, optimizer, scaling, rate, "train_loss")
        means = means_by_rank(found)
        if len(means) < 2:
            return Row(claim, UNMEASURED, "–")
        spread[scaling] = max(means.values()) - min(means.values())
        ends = ", ".join(f"{means[rank]:.3f} at r = {rank}" for rank in (min(means), max(means)))
        said.append(f"{name} training losses span {spread[scaling]:.4f} over {len(means)} ranks ({ends})")
        counts.append(len(common_seeds(found)))
    measured = f"at rate {rate:g} {', '.join(said)} ({count_seeds(min(counts))})"
    return Row(claim, measured, "yes" if spread["lora"] < math.log(1.01) else "no")


def norms(done: Done, optimizer: str, scaling: str, claim: str, *, collapse: bool) -> Row:
    """The mean gradient norm of a factor over the run, by rank."""
    found = by_rank(done, optimizer, scaling, common_rate(done, optimizer), "mean_factor_norm")
    means = means_by_rank(found)
    if len(means) < 2:
        return Row(claim, UNMEASURED, "–")
    first, last = means[min(means)], means[max(means)]
    fit = exponent(list(means), list(means.values()))
    times = max(means.values()) / min(means.values())
    measured = f"{first:.3g} at r = {min(means)}, {last:.3g} at r = {max(means)}: "
    measured += f"like r^{fit.slope:.2f} ({count_seeds(len(common_seeds(found)))})" if fit else ""
    holds = fit is not None and fit.slope < -0.25 and last < first if collapse else times < 10
    return Row(claim, measured, "yes" if holds else "no")


def at_best_rates(done: Done, optimizer: str, scaling: str) -> dict[int, tuple[float, dict[int, float]]]:
    """Return (rate, held-out loss by seed) of each rank, at the rate of the first seed's least loss."""
    found = {}
    for rank in sorted({s.rank for s in done if (s.optimizer, s.scaling) == (optimizer, scaling)}):
        losses = losses_by_rate(done, optimizer, rank, scaling)
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if finite:
            rate = min(finite, key=finite.__getitem__)
            found[rank] = (rate, by_rank(done, optimizer, scaling, rate, "heldout_loss")[rank])
    return found


def best_of_all(done: Done, optimizer: str, claim: str) -> Row:
    """rsLoRA's largest rank at its best rate against LoRA at its best rank and rate, seed by seed."""
    if not several_rates(done, optimizer):
        return Row(claim, UNMEASURED, "–")
    ours, theirs = at_best_rates(done, optimizer, "rslora"), at_best_rates(done, optimizer, "lora")
    if not ours or not theirs:
        return Row(claim, UNMEASURED, "–")
    means = means_by_rank({rank: losses for rank, (_, losses) in theirs.items()})
    high, rank = max(ours), min(means, key=means.__getitem__)
    (rate, losses), (other, least) = ours[high], theirs[rank]
    seeds = sorted(losses.keys() & least.keys())

    def mean(losses):
        return float(np.mean([losses[seed] for seed in seeds]))

    gap, error = mean_and_error([losses[seed] - least[seed] for seed in seeds])
    measured = (
        f"held-out {mean(losses):.4f} (rsLoRA, r = {high}, rate {rate:g}) against {mean(least):.4f} (LoRA, r = {rank}, "
        f"rate {other:g}), a difference of {signed(gap, error)} ({count_seeds(len(seeds))})"
    )
    return Row(claim, measured, judged(gap, error))


def init_only(done: Done) -> Row:
    claim = (
        "B.3: scaling only A's start by 1/sqrt(r) gives equal gradient norms at first, then instability at high rank"
    )
    rate = common_rate(done, "adamw")
    first = by_rank(done, "adamw", "init-only", rate, "first_factor_norm")
    held = by_rank(done, "adamw", "init-only", rate, "heldout_loss")
    if len(first) < 2:
        return Row(claim, UNMEASURED, "–")
    worse = change(held)
    if worse is None:
        return Row(claim, UNMEASURED, "–")
    gap, error, seeds, _, _ = worse
    norms = means_by_rank(first)
    losses = ", ".join(f"{mean:.3f} at r = {rank}" for rank, mean in means_by_rank(held).items())
    equal = max(norms.values()) / min(norms.values())
    measured = (
        f"first norms within {equal:.2f}x of each other; held-out {losses}, a difference of {signed(gap, error)} "
        f"({count_seeds(seeds)})"
    )
    return Row(claim, measured, judged(-gap, error) if equal < 2 else judged(math.inf, error))


def other_exponents(done: Done) -> Row:
    claim = "B.6: at high rank r^-1/4 is unstable and r^-2 learns nothing"
    rate = common_rate(done, "adamw")
    names = {"rslora": "r^-1/2", "quarter": "r^-1/4", "square": "r^-2"}
    found = {scaling: by_rank(done, "adamw", scaling, rate, "heldout_loss") for scaling in names}
    shared = set.intersection(*map(set, found.values()))
    if not shared:
        return Row(claim, UNMEASURED, "–")
    rank = max(shared)
    seeds = sorted(set.intersection(*(set(losses[rank]) for losses in found.values())))
    if not seeds:
        return Row(claim, UNMEASURED, "–")
    held = {scaling: np.array([losses[rank][seed] for seed in seeds]) for scaling, losses in found.items()}
    said, verdicts = [f"{held['rslora'].mean():.4f} with {names['rslora']}"], []
    for scaling in ("quarter", "square"):
        gap, error = mean_and_error(list(held[scaling] - held["rslora"]))
        said.append(f"{held[scaling].mean():.4f} with {names[scaling]} ({signed(gap, error)})")
        verdicts.append(judged(-gap, error))
    measured = f"held-out at r = {rank}: {', '.join(said)} ({count_seeds(len(seeds))})"
    return Row(claim, measured, min(verdicts))  # no, undecided, yes: as the alphabet has it


def moments(rows: Sequence[Mapping[str, str]]) -> Row:
    """Adapters' outputs stay below one on the mean, peak at most at twice the last, and level off from halfway on."""
    claim = "B.7: the moments of activations stay small and stable for both methods (AdamW; here of adapters' outputs)"
    if not rows:
        return Row(claim, UNMEASURED, "–")
    runs: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        runs.setdefault((row["scaling"], int(row["rank"])), []).append(float(row["mean"]))
    said = []
    for scaling, name in (("rslora", "rsLoRA"), ("lora", "LoRA")):
        ends = [f"{means[-1]:.3g} at r = {rank}" for (of, rank), means in sorted(runs.items()) if of == scaling]
        said.append(f"{name}'s {', '.join(ends)}")
    times = max(max(means) / means[-1] for means in runs.values())
    measured = (
        f"mean absolute entry after {rows[-1]['step']} steps: {'; '.join(said)}; at most {times:.2f} times that on the "
        "way ([all](activations.csv))"
    )
    if not (all(means[-1] < 1 for means in runs.values()) and times <= 2):
        return Row(claim, measured, "no, of one seed")
    growing = any(means[-1] > 1.5 * means[len(means) // 2] for means in runs.values())
    stable = "; stable: still growing at the end" if growing else ", and stable"
    return Row(claim, measured, f"small: yes{stable}, of one seed")


def at_own_best(done: Done, optimizer: str, claim: str) -> Row:
    """At one rate the ranks may differ for the rate alone: under Adam outputs grow like gamma lr r at first."""
    best = at_best_rates(done, optimizer, "rslora")
    found = {rank: losses for rank, (_, losses) in best.items()}
    ends = change(found)
    if ends is None or not several_rates(done, optimizer):
        return Row(claim, UNMEASURED, "–")
    listed = ", ".join(f"{loss:.4f} at r = {rank}" for rank, loss in means_by_rank(found).items())
    gap, error, seeds, low, high = ends
    measured = (
        f"rsLoRA's held-out losses there: {listed} ({count_seeds(len(common_seeds(found)))}); "
        f"from r = {low} to {high} {signed(gap, error)} ({count_seeds(seeds)})"
    )
    return Row(claim, measured, judged(gap, error))


def judged(gap: float, error: float) -> str:
    """Say whether a difference is below zero, by two standard errors where there is more than one seed."""
    if math.isnan(error):
        return f"{'yes' if gap < 0 else 'no'}, of one seed"
    return "yes" if gap < -2 * error else "no" if gap > 2 * error else "undecided: within two standard errors"


def count_seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


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
