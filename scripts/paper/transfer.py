"""One learning rate for all ranks: the loss by the rule for Adam, and without it, from finished trials."""

import math
from collections.abc import Mapping

import numpy as np

from paper.claims import count_seeds, signed
from paper.figures import Done
from paper.rates import best_rate, losses_by_rate
from paper.store import mean_and_error

REFERENCE = 8


def at_rate(losses: Mapping[float, float], rate: float) -> float:
    """Return the loss at a rate between those tried, on the line through its neighbours over log rate; else NaN.

    >>> at_rate({1e-4: 3.0, 1e-2: 2.0}, 1e-3), at_rate({1e-4: 3.0, 1e-2: 2.0}, 1.0)
    (2.5, nan)
    """
    rates = sorted(losses)
    if not rates or not rates[0] <= rate <= rates[-1]:
        return math.nan
    return float(np.interp(math.log(rate), np.log(rates), [losses[r] for r in rates]))


def losses_near(trained: Done, rank: int, rate: float) -> dict[int, float]:
    """Return the held-out losses by seed of trials of their own at a rate, to 2 %."""
    return {
        spec.seed: trial["heldout_loss"]
        for spec, trial in trained.items()
        if (spec.optimizer, spec.rank, spec.scaling) == ("adamw", rank, "rslora")
        and spec.rate is not None
        and abs(spec.rate / rate - 1) < 0.02
        and trial["diverged"] is None
    }


def transfer_table(done: Done, trained: Done) -> list[str]:
    """Return each rank's loss at the best rate of the reference rank, as it is and by the rule, as Markdown."""
    ranks = sorted({s.rank for s in done if (s.optimizer, s.scaling) == ("adamw", "rslora")})
    losses = {rank: losses_by_rate(done, "adamw", rank, "rslora") for rank in ranks}
    best = best_rate(losses.get(REFERENCE, {}))
    if best is None or best.at_edge:
        return []
    lines = [
        f"One rate for all ranks: AdamW's best for rsLoRA of rank {REFERENCE} is {best.rate:.2g}. Each rank's held-out "
        f"loss there, and at that times (r / {REFERENCE})^-1/4, which `rslora_jax.train.scale_by_rank` makes of it. "
        "Those with ~ are read off the lines between the rates that were tried (so rather too large than too small), "
        "the others were trained there; one seed:",
        "",
        "| rank | best rate tried | its loss | at one rate | by the rule, at | loss |",
        "|---|---|---|---|---|---|",
    ]
    for rank in ranks:
        ruled = best.rate * (rank / REFERENCE) ** -0.25
        least = min(losses[rank], key=losses[rank].__getitem__)
        said = [
            told(at_rate(losses[rank], rate), losses_near(trained, rank, rate).get(0, math.nan))
            for rate in (best.rate, ruled)
        ]
        lines.append(f"| {rank} | {least:g} | {losses[rank][least]:.4f} | {said[0]} | {ruled:.2g} | {said[1]} |")
    lines.append("")
    for rank in ranks:
        one, ruled = (losses_near(trained, rank, rate) for rate in (best.rate, best.rate * (rank / REFERENCE) ** -0.25))
        if seeds := sorted(one.keys() & ruled.keys()):
            gap, error = mean_and_error([ruled[seed] - one[seed] for seed in seeds])
            lines.append(
                f"Trained at both, rank {rank} ends by the rule at {np.mean([ruled[s] for s in seeds]):.4f} and at the "
                f"one rate at {np.mean([one[s] for s in seeds]):.4f}, a difference of {signed(gap, error)} "
                f"({count_seeds(len(seeds))}).\n"
            )
    return lines


def told(read: float, trained: float) -> str:
    """Write the loss that was trained, else the one that was read off."""
    if not math.isnan(trained):
        return f"{trained:.4f}"
    return "–" if math.isnan(read) else f"~{read:.4f}"
