"""The paper's appendix B.7 on a small model: how large the adapters' outputs are while LoRA and rsLoRA train.

    python scripts/activation_moments.py --model tiny --steps 8 --ranks 2,8     # to try it out: a minute
    python scripts/activation_moments.py --data train.jsonl                     # SmolLM2-135M; into docs/paper

Trains one run for each rank and scaling with AdamW at one constant rate, on the same batches, and measures along it
the mean of |entry| and of its square over all adapters' outputs (`analysis.stability.measure`, on the step's batch).
Writes activations.csv, a line for each run and step measured, and activations.png.
"""

import argparse
import csv
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from paper.figures import NAMES
from rank_sweep import cost_of_a_rank, load_model

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.analysis.stability import measure
from rslora_jax.commands.heldout import Asked, split
from rslora_jax.train.report import clock

DOCS = Path(__file__).parent.parent / "docs" / "paper"
SCALINGS = ("rslora", "lora")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny (random, of bytes) or a GGUF file (smollm2)")
    add("--data", type=Path, help="a .jsonl, .parquet or .txt file (docstrings of Python)")
    add("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[4, 32, 512], help="(4,32,512)")
    add("--learning-rate", type=float, default=3.2e-4, help="of AdamW, constant (3.2e-4)")
    add("--alpha", type=float, default=16.0, help="numerator of the scale (16)")
    add("--steps", type=int, default=24, help="of each run (24)")
    add("--every", type=int, default=4, help="steps from one measurement to the next (4)")
    add("--batch-size", type=int, default=2, help="rows of a step (2)")
    add("--max-len", type=int, default=192, help="tokens of a row (192)")
    add("--seed", type=int, default=0, help="of adapters and data order (0)")
    add("--out", type=Path, default=DOCS, help="folder of the results (docs/paper)")
    a = parser.parse_args(argv)
    a.dtype, a.remat = "float32", "none"
    if a.data and not a.data.is_file():
        parser.error(f"--data {a.data} is no file")
    if min([a.steps, a.every, *a.ranks]) < 1:
        parser.error("--steps, --every and --ranks are to be at least 1")
    return a


def main(argv: Sequence[str] | None = None) -> int:
    a = parse(argv)
    model, variables, tokenizer = load_model(a)
    rows = train.prepare(tokenizer, split(Asked(a.data and str(a.data))).training, max_len=a.max_len)
    batches = list(itertools.islice(train.train_batches(rows, batch_size=a.batch_size, seed=a.seed), a.steps))
    loss, measured = train.token_loss(rows.places), []
    runs, begun = list(itertools.product(a.ranks, SCALINGS)), time.monotonic()
    for n, (rank, scaling) in enumerate(runs):
        lora = wrap(model, variables, rank, scaling, a.alpha)
        per_rank = cost_of_a_rank(lora, rank, variables)
        past, whole = (sum(1 + per_rank * of for of, _ in part) for part in (runs[:n], runs))
        for row in one_run(a, lora, variables, batches, loss, {"rank": rank, "scaling": scaling}):
            measured.append(row)
            left = (time.monotonic() - begun) * (whole / (past + (1 + per_rank * rank) * row["step"] / a.steps) - 1)
            print(
                f"run {n + 1} of {len(runs)}, {NAMES[scaling]} of rank {rank}, step {row['step']}/{a.steps}: "
                f"loss {row['loss']:.4f}, mean |output| {row['mean']:.3g}, about {clock(left)} left",
                flush=True,
            )
    a.out.mkdir(parents=True, exist_ok=True)
    write(a.out / "activations.csv", measured)
    draw(a.out / "activations.png", measured)
    print(f"{a.out}/activations.csv, activations.png")
    return 0


def wrap(model: Any, variables: Any, rank: int, scaling: str, alpha: float) -> rslora.Lora:
    config = rslora.LoraConfig(rank=rank, alpha=alpha, scaling=scaling, allow_large_rank=True)
    return rslora.wrap(model.apply, variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)


def one_run(
    a: argparse.Namespace,
    lora: rslora.Lora,
    variables: Any,
    batches: list[Any],
    loss: train.Loss,
    named: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Train a run; give what is measured, on the batch of the step, after some of its steps."""
    optimizer = train.make_optimizer("adamw", schedule=a.learning_rate, clip=None)
    state = train.TrainState.create(lora.init(jax.random.key(a.seed)), optimizer)
    step = train.make_step(lora, loss, optimizer)

    def mean_loss(run, batch):
        total, count = loss(run, batch)
        return total / count

    moments = jax.jit(partial(output_moments, lora, mean_loss))
    for n, batch in enumerate(batches, 1):
        state, metrics = step(state, variables, batch)
        if n % a.every == 0 or n in (1, a.steps):
            found = jax.device_get(moments(variables, state.adapters, batch))
            yield named | {"step": n, "loss": float(metrics["loss"])} | {k: float(v) for k, v in found.items()}


def output_moments(lora: rslora.Lora, loss: Any, params: Any, adapters: Any, batch: Any) -> dict[str, Any]:
    """Return the mean of |output| and of its square over all adapters' outputs, and the largest adapter's mean."""
    sites = measure(lora, loss, params, adapters, batch).values()
    first, second = (jnp.concatenate([jnp.ravel(site.output[m]) for site in sites]) for m in (1, 2))
    return {"mean": first.mean(), "square": second.mean(), "largest": first.max()}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def draw(file: Path, rows: list[dict[str, Any]]) -> None:
    """Draw a panel for each moment: a line for each rank, whole for rsLoRA and dashed for LoRA."""
    ranks = sorted({row["rank"] for row in rows})
    colors = dict(zip(ranks, colormaps["viridis"](np.linspace(0, 0.9, len(ranks))), strict=True))
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    labels = {"mean": "mean |entry| of an adapter's output", "square": "mean square of its entries"}
    axes = figure.subplots(1, len(labels))
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for rank, (scaling, style) in itertools.product(ranks, zip(SCALINGS, ("-", "--"), strict=True)):
            line = [(r["step"], r[key]) for r in rows if (r["rank"], r["scaling"]) == (rank, scaling)]
            if line and all(math.isfinite(value) for _, value in line):
                axis.plot(*zip(*line, strict=True), style, color=colors[rank], label=f"{NAMES[scaling]}, r = {rank}")
        axis.set(xlabel="step", ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
