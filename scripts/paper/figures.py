"""The paper's figures 2 and 3, and the table of held-out losses, from finished trials."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from paper.plan import Grid, Spec
from paper.rates import common_rate, exploded
from paper.store import mean_and_error
from rslora_jax.train.curves import running_mean

NAMES = {
    "rslora": "rsLoRA",
    "lora": "LoRA",
    "constant": "scale 1",
    "quarter": "scale r^-1/4",
    "square": "scale r^-2",
    "init-only": "scale 1, A / sqrt(r)",
}
BOTH = {"rslora", "lora"}
Done = Mapping[Spec, Mapping[str, Any]]


def draw(prefix: str, grid: Grid, done: Done) -> list[Path]:
    """Draw both figures for each optimiser, at its common rate, as PNG files `{prefix}...`; return them."""
    files = []
    for optimizer in grid.optimizers:
        rate = common_rate(done, optimizer)
        at_rate = [spec for spec in done if (spec.optimizer, spec.rate, spec.seed) == (optimizer, rate, 0)]

        def of(scaling, tried=at_rate):
            return len({spec.rank for spec in tried if spec.scaling == scaling})

        shown = [name for name in grid.scalings if of(name) and (name in BOTH or of(name) > 1)]
        if {spec.scaling for spec in at_rate} - BOTH:
            files.append(Path(f"{prefix}scales-{optimizer}.png"))
            draw_scales(files[-1], grid, done, at_rate)
        found = {
            (spec.scaling, spec.rank): {s.seed: t for s, t in done.items() if s == same_but_seed(s, spec)}
            for spec in grid.specs()
            if (spec.optimizer, spec.rate, spec.seed) == (optimizer, rate, 0) and spec.scaling in shown
        }
        if not any(found.values()):
            continue
        # A seed has its own batches: curves over different seeds would lie apart for that alone.
        seeds = set.intersection(*(set(trials) for trials in found.values() if trials))
        curves = {at: [trials[seed] for seed in sorted(seeds & set(trials))] for at, trials in found.items()}
        title = f"{optimizer}, learning rate {rate:g}"

        def smooth(losses):
            return np.exp(np.minimum(running_mean(losses), 700))

        for name, key, change, label in (
            ("perplexity", "losses", smooth, "training perplexity (running mean)"),
            ("gradients", "factor_norms", running_mean, "average parameter gradient norm"),
        ):
            files.append(Path(f"{prefix}{name}-{optimizer}.png"))
            panels(files[-1], dataclasses.replace(grid, scalings=shown), curves, key, change, label, title)
    return files


def draw_scales(file: Path, grid: Grid, done: Done, tried: list[Spec]) -> None:
    """Draw the first seed's curves of the largest rank, one for each scale: the paper's B.3 and B.6."""
    rank = max(spec.rank for spec in tried if spec.scaling not in BOTH)
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(
        axes, ("losses", "factor_norms"), ("training loss", "parameter gradient norm"), strict=True
    ):
        for scaling in grid.scalings:
            for spec in tried:
                if (spec.rank, spec.scaling) == (rank, scaling):
                    curve = running_mean(done[spec][key])
                    axis.plot(range(1, len(curve) + 1), curve, label=NAMES.get(scaling, scaling))
        axis.set(xlabel="step", ylabel=f"{label} (running mean)", yscale="log" if key == "factor_norms" else "linear")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"rank {rank}, {tried[0].optimizer}, learning rate {tried[0].rate:g}; one seed", fontsize=10)
    figure.savefig(file, dpi=150)


def same_but_seed(spec: Spec, of: Spec) -> Spec:
    return Spec(of.optimizer, of.rank, of.scaling, of.rate, spec.seed)


def panels(
    file: Path,
    grid: Grid,
    curves: Mapping[tuple[str, int], list[Mapping[str, Any]]],
    key: str,
    change: Callable[[list[float]], Any],
    label: str,
    title: str,
) -> None:
    """Draw a panel for each scaling and a curve for each rank: the mean over seeds."""
    figure = Figure(figsize=(4.6 * len(grid.scalings), 3.8), layout="constrained")
    axes = figure.subplots(1, len(grid.scalings), sharey=True, squeeze=False)[0]
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(grid.ranks)))
    seeds = set()
    for axis, scaling in zip(axes, grid.scalings, strict=True):
        for rank, color in zip(grid.ranks, colors, strict=True):
            trials = curves[scaling, rank]
            if trials:
                seeds.add(len(trials))
                mean = np.mean([trial[key] for trial in trials], axis=0).tolist()
                axis.plot(range(1, len(mean) + 1), change(mean), color=color, label=f"r = {rank}")
        axis.set(title=NAMES.get(scaling, scaling), xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    if key == "losses":  # over less than a decade, a log axis by itself has hardly a number
        axes[0].yaxis.set_major_locator(MaxNLocator(8))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(label)
    count = "-".join(str(n) for n in sorted({min(seeds), max(seeds)}))
    figure.suptitle(f"{title}; mean of {count} seed{'s' * (max(seeds) > 1)}", fontsize=10)
    figure.savefig(file, dpi=150)


def table(grid: Grid, done: Done) -> str:
    """Return held-out losses by optimiser, scaling and rank, at the best rate and at the common one, as Markdown."""
    lines = [
        "| optimiser | scaling | rank | best rate | held-out loss | at the common rate "
        "| seeds (best, common) | blew up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    edges = False
    for optimizer in grid.optimizers:
        for scaling in grid.scalings:
            for rank in grid.ranks:
                best = grid.best(done, optimizer, rank, scaling)
                trials = [s for s in done if (s.optimizer, s.scaling, s.rank) == (optimizer, scaling, rank)]
                if best is None and not trials:
                    continue
                text, seeds = loss_at(done, trials, best)
                other, more = loss_at(done, trials, common_rate(done, optimizer))
                tried = sorted({s.rate for s in trials if s.seed == 0})
                edge = best in (tried[0], tried[-1])
                edges |= edge
                bad = sum(exploded(done[s]) for s in trials)
                rate = "none" if best is None else f"{best:g}{'*' if edge else ''}"
                lines.append(
                    f"| {optimizer} | {NAMES.get(scaling, scaling)} | {rank} | {rate} | {text} | {other} "
                    f"| {seeds}, {more} | {bad} of {len(trials)} |"
                )
    about = (
        "\nLosses are nats a token, the mean over seeds ± its standard error where there are two or more. The best "
        "rate is that of the first seed's least loss. A run blows up that diverges, or ends a nat above the training "
        "loss that it began with."
    )
    common = ", ".join(f"{common_rate(done, o):g} ({o})" for o in grid.optimizers if common_rate(done, o) is not None)
    about += f" The common rate, the middle one of those at which no run blows up, is {common}."
    if edges:
        about += " *: at an edge of the rates tried, so a better one may lie beyond."
    return "\n".join(lines) + "\n" + about + "\n"


def loss_at(done: Done, trials: list[Spec], rate: float | None) -> tuple[str, int]:
    """Write the held-out loss at a rate; count its seeds."""
    values = [done[s]["heldout_loss"] for s in trials if s.rate == rate and done[s]["diverged"] is None]
    if not values:
        return "–", 0
    mean, error = mean_and_error(values)
    return (f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"), len(values)
