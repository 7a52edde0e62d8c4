"""The best learning rate by rank, from finished trials, and the exponent with which it goes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from paper.plan import Spec


class Best(NamedTuple):
    """A best learning rate, between those tried, and whether it may lie beyond them."""

    rate: float
    at_edge: bool


class Exponent(NamedTuple):
    """rate ~ rank ** slope, with a 95 % interval; infinite where there are but two ranks."""

    slope: float
    low: float
    high: float


def common_rate(done: Mapping[Spec, Mapping[str, Any]], optimizer: str) -> float | None:
    """Return the rate at which ranks and scalings are compared: the middle one of those at which none blows up.

    Only rates that the most ranks and scalings have are asked about. Where a run of rsLoRA or LoRA blows up, nothing is
    to be compared; if that is so at every rate, it is the middle one of all.
    """
    cells: dict[float, set[tuple[int, str]]] = {}
    blown = set()
    for spec, trial in done.items():
        if spec.optimizer == optimizer and spec.seed == 0 and spec.rate is not None:
            cells.setdefault(spec.rate, set())
            if spec.scaling in ("rslora", "lora"):
                cells[spec.rate].add((spec.rank, spec.scaling))
                blown |= {spec.rate} if exploded(trial) else set()
    most = max(map(len, cells.values()), default=0)
    tried = sorted(rate for rate, of in cells.items() if len(of) == most)
    rates = [rate for rate in tried if rate not in blown] or tried
    return rates[(len(rates) - 1) // 2] if rates else None


def exploded(trial: Mapping[str, Any]) -> bool:
    """Say whether a run diverged or ended a nat above its first loss, which is more than batches differ by."""
    return trial["diverged"] is not None or trial["train_loss"] > trial["losses"][0] + 1


def losses_by_rate(
    done: Mapping[Spec, Mapping[str, Any]], optimizer: str, rank: int, scaling: str
) -> dict[float, float]:
    """Return the first seed's held-out loss by rate; infinite where it diverged."""
    found = {}
    for spec, trial in sorted(done.items(), key=lambda item: item[0].rate):
        if (spec.optimizer, spec.rank, spec.scaling, spec.seed) == (optimizer, rank, scaling, 0):
            bad = trial["diverged"] is not None or not math.isfinite(trial["heldout_loss"])
            found[spec.rate] = math.inf if bad else trial["heldout_loss"]
    return found


def best_rate(losses: Mapping[float, float]) -> Best | None:
    """Return where the parabola through the least loss and its two neighbours, over log rate, has its least.

    Where the least is at an edge, or a neighbour blew up (diverged, or is a nat worse), it is that rate itself. None
    for no finite loss.

    >>> best_rate({1e-4: 3.0, 1e-3: 2.0, 1e-2: 3.0})
    Best(rate=0.001, at_edge=False)
    >>> best_rate({1e-4: 2.0, 1e-3: 3.0})
    Best(rate=0.0001, at_edge=True)
    """
    rates = sorted(losses)
    finite = [rate for rate in rates if math.isfinite(losses[rate])]
    if not finite:
        return None
    n = rates.index(min(finite, key=losses.__getitem__))
    if n in (0, len(rates) - 1):
        return Best(rates[n], True)
    around = rates[n - 1 : n + 2]
    if any(losses[rate] > losses[rates[n]] + 1 for rate in around):
        return Best(rates[n], False)
    square, slope, _ = np.polyfit([math.log(rate / rates[n]) for rate in around], [losses[r] for r in around], 2)
    return Best(float(rates[n] * math.exp(-slope / (2 * square))) if square > 0 else rates[n], False)


def exponent(ranks: Sequence[int], rates: Sequence[float]) -> Exponent | None:
    """Fit log rate over log rank by least squares, with Student's interval; None for less than two ranks.

    >>> round(exponent([4, 16, 64], [1.0, 0.5, 0.25]).slope, 3)
    -0.5
    """
    if len(ranks) < 2:
        return None
    line, free = scipy.stats.linregress(np.log(ranks), np.log(rates)), len(ranks) - 2
    reach = float(scipy.stats.t.ppf(0.975, free) * line.stderr) if free else math.inf
    return Exponent(float(line.slope), float(line.slope) - reach, float(line.slope) + reach)
