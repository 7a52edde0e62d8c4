"""Measure theorem 3.2 of arXiv 2312.03732: how adapters' outputs and gradients grow with the rank, by gamma.

    python scripts/stability.py                 # ranks 4 to 8192; into docs/paper/stability.csv and .png
    python scripts/stability.py --quick --out /tmp/quick

With B = 0 and A of iid entries at the start, the theorem says that after n steps of SGD the m-th moment of an adapter's
output grows like (gamma^2 r)^m and the gradient that it passes on like gamma^2 r: only gamma ~ r^-1/2 keeps both. The
gradient by B then grows like gamma r^1/2, and that by A like gamma^2 r^1/2.

Each is measured on a linear layer and on a small Llama decoder after some steps of SGD on one batch, at a learning rate
so small that the term in gamma^2 leads for every gamma, and its exponent is fitted: a line through log value against
log rank for each seed, the mean over the sites, and Student's interval over the seeds. The theorem is on large ranks:
it needs A'A to be near its mean, so fits take ranks of at least 8 times the width. Then the same steps at a learning
rate at which rsLoRA learns show where that breaks: where a step's loss is above the first, training is unstable, and
no exponent is of use.
"""

import argparse
import csv
import dataclasses
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jax import Array, lax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import rslora_jax as rslora
from rslora_jax.analysis.stability import Stability, measure
from rslora_jax.models.decoder import Decoder, DecoderConfig

if jax.__version_info__ < (0, 11):  # its XLA compiles three times as fast without these
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

RANKS = (4, 8, 32, 128, 512, 2048, 8192)
WIDTH, ALPHA = 16, 2.0
TOLERANCE = 0.1  # how far a fitted exponent may be from the theory's
# The exponent c of gamma = alpha r^c, and how a config says it.
GAMMAS: Mapping[str, tuple[float, Any]] = {
    "1/sqrt(r)": (-0.5, "rslora"),
    "1/r": (-1.0, "lora"),
    "r^-1/4": (-0.25, lambda rank: rank**-0.25),
    "r^-2": (-2.0, lambda rank: rank**-2.0),
    "constant": (0.0, "constant"),
}
# What is measured at a site, and its exponent under gamma ~ r^c.
QUANTITIES: Mapping[str, tuple[Callable[[Stability], Array], Callable[[float], float]]] = {
    "output, m = 1": (lambda s: s.output[1], lambda c: 2 * c + 1),
    "output, m = 2": (lambda s: s.output[2], lambda c: 2 * (2 * c + 1)),
    "output, m = 4": (lambda s: s.output[4], lambda c: 4 * (2 * c + 1)),
    "input gradient": (lambda s: jnp.sqrt(s.input_grad[2]), lambda c: 2 * c + 1),
    "gradient of A": (lambda s: s.factor_grads["a"], lambda c: 2 * c + 0.5),
    "gradient of B": (lambda s: s.factor_grads["b"], lambda c: c + 0.5),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to train.

    Attributes:
      make: gives the function's parameters and a batch from a key.
      fn, loss: the function, and the loss of its adapted form on a batch.
      small, usual: learning rates: in the regime of the theorem, and one at which rsLoRA learns.
    """

    make: Callable[[Array], tuple[Any, Any]]
    fn: Callable[..., Any]
    loss: Callable[..., Array]
    small: float
    usual: float


def linear() -> Problem:
    """A layer of iid weights, inputs and targets, with the squared error."""

    def make(key: Array) -> tuple[Any, Any]:
        w, x, y = jnp.split(jax.random.normal(key, (WIDTH + 8 + 8, WIDTH)), (WIDTH, WIDTH + 8))
        return {"w": w / math.sqrt(WIDTH)}, (x, y)

    def loss(run: Callable[..., Array], batch: Any) -> Array:
        x_BxD, y_BxD = batch
        return jnp.mean(jnp.sum((run(x_BxD) - y_BxD) ** 2, -1)) / 2

    return Problem(jax.jit(make), lambda params, x_BxD: x_BxD @ params["w"], loss, small=1e-6, usual=0.1)


def transformer() -> Problem:
    """A decoder of random weights, with adapters on all its linear layers, on random tokens."""
    sizes = {"width": WIDTH, "mlp_width": 2 * WIDTH, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
    model = Decoder(DecoderConfig(vocab_size=64, scan_layers=True, **sizes))

    def make(key: Array) -> tuple[Any, Any]:
        tokens = jax.random.randint(key, (2, 9), 0, 64, jnp.int32)
        return model.init(key, tokens), tokens

    def loss(run: Callable[..., Array], tokens_BxT: Array) -> Array:
        logits = run(tokens_BxT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:]).mean()

    return Problem(jax.jit(make), model.apply, loss, small=1e-6, usual=1.0)


PROBLEMS = {"linear layer": linear, "transformer": transformer}


def experiment(problem: Problem, scaling: Any, rank: int, steps: int) -> Callable[[int, float], Any]:
    """Return a function of a seed and a learning rate that trains, and gives (values by quantity, losses).

    The values are arrays over all sites; the losses are those of each step over that of the first.
    """
    config = rslora.LoraConfig(rank=rank, alpha=ALPHA, scaling=scaling, allow_large_rank=True)
    params, batch = jax.eval_shape(problem.make, jax.random.key(0))

    # The loss is what is wrapped: so the shapes of the model's own arguments need not be known here.
    def whole(params, batch):
        return problem.loss(lambda *args: problem.fn(params, *args), batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rslora.RsloraWarning)  # ranks above the width are the point
        lora = rslora.wrap(whole, params, batch, config=config)

    @jax.jit
    def run(params: Any, batch: Any, key: Array, learning_rate: Array) -> tuple[dict[str, Array], Array]:
        def loss(adapters):
            return lora.apply(params, adapters, batch)

        def step(adapters: Any, _: None) -> tuple[Any, Array]:
            value, grads = jax.value_and_grad(loss)(adapters)

            def move(p, g):
                return p - learning_rate.astype(p.dtype) * g

            return jax.tree.map(move, adapters, grads), value

        end, losses = lax.scan(step, lora.init(key), length=steps)
        sites = measure(lora, lambda run, batch: run(batch), params, end, batch).values()
        values = {q: jnp.concatenate([jnp.ravel(of(s)) for s in sites]) for q, (of, _) in QUANTITIES.items()}
        return values, losses / losses[0]

    def train(seed: int, learning_rate: float) -> Any:
        base, adapters = jax.random.split(jax.random.key(seed))
        return jax.device_get(run(*problem.make(base), adapters, jnp.asarray(learning_rate, float)))

    return train


def slopes(ranks: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return the least-squares slope of log value against log rank, the first axis, for each of the other entries."""
    x = np.log(np.asarray(ranks, float))
    x -= x.mean()
    return np.tensordot(x, np.log(values), 1) / (x @ x)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return Student's confidence interval of the mean of independent samples.

    >>> [round(x, 3) for x in interval(np.array([1.0, 2.0, 3.0]))]
    [-0.484, 4.484]
    """
    low, high = scipy.stats.t.interval(level, len(samples) - 1, samples.mean(), scipy.stats.sem(samples))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted exponent beside the theory's; `least` and `most` are those of single sites."""

    problem: str
    gamma: str
    quantity: str
    theory: float
    measured: float
    low: float
    high: float
    least: float
    most: float
    agrees: bool


def fit(problem: str, gamma: str, quantity: str, ranks: Sequence[int], values: np.ndarray) -> Fit:
    """Fit an exponent to values of shape (ranks, seeds, sites)."""
    found = slopes(ranks, values)
    by_seed, by_site = found.mean(axis=1), found.mean(axis=0)
    theory = QUANTITIES[quantity][1](GAMMAS[gamma][0])
    agrees = bool(abs(by_seed.mean() - theory) <= TOLERANCE)
    return Fit(
        problem, gamma, quantity, theory, by_seed.mean(), *interval(by_seed), by_site.min(), by_site.max(), agrees
    )


def measure_all(names: Sequence[str], ranks: Sequence[int], seeds: int, steps: int) -> tuple[list[dict], list[Fit]]:
    """Return a row for each problem, gamma, rank and seed, and the fits."""
    rows, fits = [], []
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*bar, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names) * len(GAMMAS) * len(ranks))
        problems = {name: PROBLEMS[name]() for name in names}
        for name, (gamma, (_, scaling)) in itertools.product(names, GAMMAS.items()):
            problem, found = problems[name], {}
            for rank in ranks:
                progress.update(task, description=f"{name}, {gamma}, rank {rank}")
                run = experiment(problem, scaling, rank, steps)
                for seed in range(seeds):
                    values, small = run(seed, problem.small)
                    _, usual = run(seed, problem.usual)
                    found[rank, seed] = values
                    means = {q: float(np.exp(np.log(values[q]).mean())) for q in QUANTITIES}
                    losses = {
                        "last loss": float(usual[-1]),
                        "highest loss": float(usual.max()),  # NaN if one is
                        "highest loss at the small rate": float(small.max()),
                    }
                    rows.append({"problem": name, "gamma": gamma, "rank": rank, "seed": seed, **means, **losses})
                progress.advance(task)
            fitted = [rank for rank in ranks if rank >= 8 * WIDTH]
            for quantity in QUANTITIES:
                values = np.array([[found[rank, seed][quantity] for seed in range(seeds)] for rank in fitted])
                fits.append(fit(name, gamma, quantity, fitted, values))
    return rows, fits


def over_seeds(rows: Sequence[dict], column: str, **wanted: Any) -> dict[int, np.ndarray]:
    """Return the values of a column over the seeds, by rank."""
    chosen = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    return {row["rank"]: np.array([r[column] for r in chosen if r["rank"] == row["rank"]]) for row in chosen}


def last_losses(rows: Sequence[dict], name: str, gamma: str) -> dict[int, float]:
    """Return the mean over the seeds of the last loss over the first, by rank; NaN where one rose above the first."""
    last, highest = (over_seeds(rows, c, problem=name, gamma=gamma) for c in ("last loss", "highest loss"))
    return {rank: last[rank].mean() if (highest[rank] < 1.001).all() else math.nan for rank in last}


def fit_table(fits: Sequence[Fit]) -> Table:
    out = Table(title="exponent of r; interval: 95 % over the seeds; sites: least and most of a single weight")
    for name in ("problem", "gamma", "quantity", "theory", "measured", "interval", "sites", "agrees"):
        out.add_column(name, justify="left" if name in ("problem", "quantity", "gamma") else "right")
    for f in fits:
        cells = (f"{f.theory:g}", f"{f.measured:.3f}", f"{f.low:.3f} to {f.high:.3f}", f"{f.least:.2f} to {f.most:.2f}")
        last = f.quantity == list(QUANTITIES)[-1]
        out.add_row(f.problem, f.gamma, f.quantity, *cells, "yes" if f.agrees else "[red]NO[/]", end_section=last)
    return out


def loss_table(rows: Sequence[dict], names: Sequence[str], ranks: Sequence[int], steps: int) -> Table:
    out = Table(
        "problem", "gamma", *map(str, ranks), title=f"loss at step {steps} at the usual rate / at step 1, by rank"
    )
    for name, gamma in itertools.product(names, GAMMAS):
        cells = ("[red]unstable[/]" if math.isnan(x) else f"{x:.3f}" for x in last_losses(rows, name, gamma).values())
        out.add_row(name, gamma, *cells)
    return out


def plot(rows: Sequence[dict], names: Sequence[str], path: Path) -> None:
    """Draw a panel for each quantity, a line for each gamma; dashed: the theory, through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = ["output, m = 2", "input gradient", "gradient of A", "gradient of B", "last loss"]
    figure, axes = plt.subplots(len(names), len(shown), figsize=(20, 4 * len(names)), squeeze=False)
    for (row, name), (column, quantity) in itertools.product(enumerate(names), enumerate(shown)):
        ax = axes[row, column]
        for n, (gamma, (c, _)) in enumerate(GAMMAS.items()):
            if quantity == "last loss":
                ratios = last_losses(rows, name, gamma)
                ax.plot(list(ratios), list(ratios.values()), "o-", color=f"C{n}", markersize=4)
                lost = [rank for rank, ratio in ratios.items() if math.isnan(ratio)]
                ax.plot(lost, [1.03 + 0.02 * n] * len(lost), "x", color=f"C{n}")
                ax.set_title(f"{name}: last loss / first, usual rate\n(x: unstable)")
                continue
            groups = over_seeds(rows, quantity, problem=name, gamma=gamma)
            ranks, values = np.array(list(groups)), np.array([np.exp(np.log(v).mean()) for v in groups.values()])
            ax.plot(ranks, values, "o-", color=f"C{n}", label=gamma, markersize=4)
            exponent = QUANTITIES[quantity][1](c)
            ax.plot(ranks, values[-1] * (ranks / ranks[-1]) ** exponent, "--", color=f"C{n}", linewidth=1)
            ax.set_title(f"{name}: {quantity}\n(dashed: theory)")
            ax.set_yscale("log")
            ax.axvspan(ranks[0] / 1.5, min(8 * WIDTH, ranks[-1]) / 1.5, color="0.95", zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("rank (grey: not in the fit)" if quantity != "last loss" else "rank")
        ax.grid(alpha=0.3)
    axes[0, 0].legend(title="gamma", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--problems", default=",".join(PROBLEMS), help="by comma (default: %(default)s)")
    add("--ranks", default=",".join(map(str, RANKS)), help="by comma (default: %(default)s)")
    add("--seeds", type=int, default=10, help="(default: %(default)s)")
    add("--steps", type=int, default=8, help="of SGD (default: %(default)s)")
    add("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "paper", help="folder (docs/paper)")
    add("--quick", action="store_true", help="the linear layer alone, at three ranks")
    arguments = parser.parse_args()
    names, ranks = arguments.problems.split(","), [int(r) for r in arguments.ranks.split(",")]
    if arguments.quick:
        names, ranks = ["linear layer"], [8, 200, 3000]
    if arguments.seeds < 2 or sum(rank >= 8 * WIDTH for rank in ranks) < 2:
        parser.error(f"an interval needs two seeds, and a fit two ranks of {8 * WIDTH} or more")
    jax.config.update("jax_enable_x64", True)  # a fourth power of r^-3 is no float32
    jax.config.update(
        "jax_disable_most_optimizations", True
    )  # each program runs a few times, so compiling is what costs
    rows, fits = measure_all(names, ranks, arguments.seeds, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "stability.csv", rows)
    write_csv(arguments.out / "stability_fits.csv", [dataclasses.asdict(f) for f in fits])
    plot(rows, names, arguments.out / "stability.png")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(fit_table(fits), loss_table(rows, names, ranks, arguments.steps))
    print(f"{arguments.out}/stability.csv, stability_fits.csv, stability.png")
    return 0 if all(f.agrees for f in fits) else 1


if __name__ == "__main__":
    sys.exit(main())
