"""Held-out loss over rank and learning rate: the map, its best rates with their exponent, and the loss by rank."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from paper.figures import NAMES, Done, draw
from paper.plan import Grid, Spec
from paper.rates import Best, Exponent, best_rate, common_rate, exponent, losses_by_rate
from paper.store import common_seeds, mean_and_error

# What the best rate is expected to grow like, as an exponent of the rank: for Adam by arXiv 2602.06204, for SGD by
# theorem 3.2 of arXiv 2312.03732, by which the change of the weight in a step goes like gamma^2 r.
EXPECTED: Mapping[tuple[str, str], float] = {
    ("adamw", "rslora"): -0.25,
    ("adamw", "lora"): 0.0,
    ("sgd", "rslora"): 0.0,
    ("sgd", "lora"): 1.0,
}


def best_rates(grid: Grid, done: Done, optimizer: str, scaling: str) -> dict[int, Best]:
    """Return the best rate of each rank that has one between those it was tried at, or has all rates of the grid."""
    found = {}
    for rank in grid.ranks:
        losses = losses_by_rate(done, optimizer, rank, scaling)
        best = best_rate(losses)
        if best and (not best.at_edge or set(losses) >= set(grid.rates[optimizer])):
            found[rank] = best
    return found


def fitted(best: Mapping[int, Best]) -> Exponent | None:
    """Fit the exponent of the best rates that lie between those tried."""
    inner = {rank: b.rate for rank, b in best.items() if not b.at_edge}
    return exponent(list(inner), list(inner.values()))


def draw_all(prefix: str, grid: Grid, done: Done) -> list[Path]:
    """Draw the paper's two figures and those of this file, as PNG files `{prefix}...`; return them."""
    return draw(prefix, grid, done) + draw_maps(prefix, grid, done) + draw_by_rank(prefix, grid, done)


def draw_maps(prefix: str, grid: Grid, done: Done) -> list[Path]:
    """Draw the map of each optimiser that has several rates; return the files."""
    files = []
    for optimizer in grid.optimizers:
        tried = {s.rate for s in done if s.optimizer == optimizer and s.seed == 0}
        rates = [rate for rate in grid.rates[optimizer] if rate in tried]
        if len(rates) > 1:
            here = [spec for spec in done if spec.optimizer == optimizer]

            def several(name, here=here):
                return len({s.rate for s in here if s.scaling == name}) > 1

            shown = dataclasses.replace(
                grid, scalings=list(filter(several, grid.scalings)), ranks=sorted({spec.rank for spec in here})
            )
            if shown.scalings:
                files.append(Path(f"{prefix}rates-{optimizer}.png"))
                draw_map(files[-1], shown, done, optimizer, rates)
    return files


def draw_map(file: Path, grid: Grid, done: Done, optimizer: str, rates: list[float]) -> None:
    """Draw a panel for each scaling: a cell for each rank and rate, and a mark at each rank's best rate."""
    tables = {}
    for scaling in grid.scalings:
        losses = [losses_by_rate(done, optimizer, rank, scaling) for rank in grid.ranks]
        tables[scaling] = np.array([[column.get(rate, math.nan) for column in losses] for rate in rates])
    finite = np.concatenate([t[np.isfinite(t)] for t in tables.values()])
    low, high = finite.min(), min(finite.max(), finite.min() + 3 * (np.median(finite) - finite.min()) + 1e-9)
    figure = Figure(figsize=(0.9 + 0.95 * len(grid.ranks) * len(grid.scalings), 1.6 + 0.6 * len(rates)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(grid.scalings), sharey=True, squeeze=False)[0]
    for axis, (scaling, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table, origin="lower", aspect="auto", cmap="viridis_r", vmin=low, vmax=high)
        for (row, column), loss in np.ndenumerate(table):
            if not math.isnan(loss):
                dark = math.isfinite(loss) and loss > (low + high) / 2
                text = f"{loss:.3f}" if math.isfinite(loss) else "div."
                axis.text(column, row - 0.35, text, ha="center", va="center", fontsize=7, color="w" if dark else "k")
        best = best_rates(grid, done, optimizer, scaling)

        def height(rate):
            return np.interp(math.log(rate), np.log(rates), range(len(rates)))

        columns = [list(grid.ranks).index(rank) for rank in best]
        axis.plot(columns, [height(b.rate) for b in best.values()], "o-", mfc="none", color="tab:red", lw=1)
        fit, expected = fitted(best), EXPECTED.get((optimizer, scaling))
        said = "" if fit is None else f"\nbest rate ~ r^{fit.slope:.2f}"
        said += "" if fit is None or expected is None else f" (expected {expected:g})"
        axis.set(title=NAMES.get(scaling, scaling) + said, xlabel="rank")
        axis.title.set_fontsize(9)
        axis.set_xticks(range(len(grid.ranks)), [str(rank) for rank in grid.ranks])
    axes[0].set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes[0].set_ylabel(f"learning rate of {optimizer}")
    figure.colorbar(image, ax=axes, label="held-out loss, nats a token")
    figure.savefig(file, dpi=150)


def draw_by_rank(prefix: str, grid: Grid, done: Done) -> list[Path]:
    """Draw the held-out loss by rank, at one rate for all and at each rank's best, a panel for each optimiser."""
    shown = [o for o in grid.optimizers if any(s.optimizer == o for s in done)]
    figure = Figure(figsize=(4.2 * len(shown), 3.6), layout="constrained")
    for axis, optimizer in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for color, scaling in (("tab:blue", "rslora"), ("tab:orange", "lora")):
            one = common_rate(done, optimizer)
            same = dict.fromkeys(grid.ranks, one)
            whole = best_rates(grid, done, optimizer, scaling)
            best = {rank: grid.best(done, optimizer, rank, scaling) for rank in whole}
            for style, label, rates in (("--", f"at {one:g}", same), ("-", "at the best", best)):
                ranks, means, errors = line({r: by_seed(done, optimizer, r, scaling, x) for r, x in rates.items()})
                if ranks:
                    bars = [0 if math.isnan(e) else e for e in errors]
                    name = f"{NAMES.get(scaling, scaling)}, {label}"
                    axis.errorbar(ranks, means, bars, fmt=f"o{style}", color=color, ms=4, capsize=3, label=name)
        axis.set(title=optimizer, xlabel="rank", xscale="log", ylabel="held-out loss, nats a token")
        axis.set_xticks(list(grid.ranks), [str(rank) for rank in grid.ranks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, handlelength=3)
    file = Path(f"{prefix}loss-by-rank.png")
    figure.savefig(file, dpi=150)
    return [file]


def line(losses: Mapping[int, Mapping[int, float]]) -> tuple[list[int], list[float], list[float]]:
    """Return (ranks, means, standard errors) over the seeds that all ranks with a loss have.

    >>> line({4: {0: 1.0, 1: 3.0}, 8: {0: 5.0}, 32: {}})
    ([4, 8], [1.0, 5.0], [nan, nan])
    """
    found = {rank: of_seed for rank, of_seed in losses.items() if of_seed}
    seeds = common_seeds(found)
    pairs = [mean_and_error([of_seed[seed] for seed in seeds]) for of_seed in found.values()] if seeds else []
    return (list(found) if seeds else []), [mean for mean, _ in pairs], [error for _, error in pairs]


def by_seed(
    done: Mapping[Spec, Mapping[str, Any]], optimizer: str, rank: int, scaling: str, rate: float | None
) -> dict[int, float]:
    """Return the held-out loss by seed, without those that diverged."""
    return {
        s.seed: trial["heldout_loss"]
        for s, trial in done.items()
        if (s.optimizer, s.rank, s.scaling, s.rate) == (optimizer, rank, scaling, rate) and trial["diverged"] is None
    }


def rate_table(grid: Grid, done: Done) -> str:
    """Return each rank's best rate and its exponent beside what is expected, as Markdown."""
    lines = [
        "| optimiser | scaling | " + " | ".join(f"r = {rank}" for rank in grid.ranks) + " | exponent | expected |",
        "|---|---|" + "---|" * (len(grid.ranks) + 2),
    ]
    for optimizer in grid.optimizers:
        for scaling in grid.scalings:
            best = best_rates(grid, done, optimizer, scaling)
            if not best:
                continue
            cells = [f"{best[r].rate:.2g}{'*' * best[r].at_edge}" if r in best else "–" for r in grid.ranks]
            fit = fitted(best)
            said = "–" if fit is None else f"{fit.slope:.2f}"
            if fit and math.isfinite(fit.low):
                said += f" ({fit.low:.2f}, {fit.high:.2f})"
            expected = EXPECTED.get((optimizer, scaling))
            lines.append(
                f"| {optimizer} | {NAMES.get(scaling, scaling)} | {' | '.join(cells)} | {said} "
                f"| {'–' if expected is None else f'{expected:g}'} |"
            )
    return "\n".join(lines) + "\n"
