"""The paper's figures 2 and 3 on a small model: LoRA and rsLoRA by rank, optimiser and learning rate.

    python scripts/rank_sweep.py --model tiny --steps 20 --ranks 2,8 --optimizers adamw      # to try it out: a minute
    python scripts/rank_sweep.py --data train.jsonl --budget 240 --out runs/gsm8k

SmolLM2-135M, adapters on all linear layers, constant learning rate, no clipping. Trials of one rank and optimiser are
trained together (`rslora_jax.train.sweep`). A finished trial is kept in --out, and a rerun does only what is not there:
a sweep of hours can be done in parts of --budget minutes. Trials that would not end in time are not begun, or given up,
and what is left out is said at the end. The order is that of use: one seed of every rank and scaling at the middle
rate, the other rates, the other seeds at the middle rate and at the best. In --out are trials.jsonl with the curves,
results.csv, perplexity-*.png and gradients-*.png for each optimiser, and table.md. --start docs/paper/sweep-all.jsonl
goes on from the trials that are kept there.
"""

import argparse
import collections
import functools
import hashlib
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from paper import figures, maps, store
from paper.plan import GAMMAS, INIT_ONLY, Grid, Spec

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.commands.heldout import Asked, split
from rslora_jax.interop.load import load_model as load_file
from rslora_jax.methods.random import uniform
from rslora_jax.models.decoder import Decoder, DecoderConfig
from rslora_jax.train.bytelevel import ByteTokenizer
from rslora_jax.train.report import clock
from rslora_jax.train.sweep import Outcome, Trial, sweep

RATES = {"adamw": [1e-4, 4e-4, 1.6e-3], "sgd": [0.1, 0.4, 1.6], "adafactor": [1e-4, 4e-4, 1.6e-3]}
TARGETS = {"all": "all-linear", "attention": "*/attn/*/kernel"}
TINY = DecoderConfig(
    vocab_size=ByteTokenizer.vocab_size,
    width=32,
    mlp_width=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    scan_layers=True,
)


class OutOfTime(Exception):
    """The budget ended within trials."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text):
        return text.split(",")

    def whole(text):
        return [int(part) for part in text.split(",")]

    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny (random, of bytes) or a GGUF file (smollm2)")
    add(
        "--data", type=Path, help="a .jsonl, .parquet or .txt file, every tenth example held out (docstrings of Python)"
    )
    add("--ranks", type=whole, default=[4, 8, 32, 128, 512], help="(4,8,32,128,512)")
    add("--scalings", type=words, default=["rslora", "lora"], help=f"of {', '.join(GAMMAS)} (rslora,lora)")
    add("--optimizers", type=words, default=["adamw", "sgd", "adafactor"], help="(adamw,sgd,adafactor)")
    listed = "; ".join(f"{name}={','.join(f'{rate:g}' for rate in rates)}" for name, rates in RATES.items())
    add(
        "--rates", action="append", default=[], metavar="NAME=X,Y,..", help=f"learning rates of an optimiser ({listed})"
    )
    add("--alpha", type=float, default=16.0, help="numerator of the scale (16)")
    add("--seeds", type=int, default=3, help="of adapters and data order (3)")
    add("--steps", type=int, default=60, help="of each trial (60)")
    add("--batch-size", type=int, default=2, help="rows of a step (2)")
    add("--max-len", type=int, default=256, help="tokens of a row (256)")
    add("--heldout", type=int, default=64, help="at most so many held-out examples (64)")
    add("--layers", choices=TARGETS, default="all", help="what gets adapters (all)")
    add("--together", type=int, default=4, help="at most so many trials in one program; memory grows with them (4)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in (float32)")
    add("--remat", default="none", help="none, full or a policy of jax.checkpoint_policies: less memory (none)")
    add("--budget", type=float, help="minutes after which to stop (until all is done)")
    add("--out", type=Path, default=Path("runs/rank_sweep"), help="folder of the results (runs/rank_sweep)")
    add("--start", type=Path, metavar="FILE", help="go on from this trials.jsonl, where --out has none yet")
    a = parser.parse_args(argv)
    rates = dict(RATES)
    try:
        rates |= {name: sorted(map(float, values.split(","))) for name, values in (r.split("=") for r in a.rates)}
    except ValueError:
        parser.error(f"--rates {' '.join(a.rates)} is not of the form adamw=1e-4,1e-3")
    if a.data and not a.data.is_file():
        parser.error(f"--data {a.data} is no file")
    if a.start and not a.start.is_file():
        parser.error(f"--start {a.start} is no file")
    for name in a.scalings:
        if name not in GAMMAS:
            parser.error(f"--scalings {name} is not one of {', '.join(GAMMAS)}")
    for name in a.optimizers:
        if name not in rates:
            parser.error(f"there are no learning rates for {name}: give --rates {name}=1e-4,1e-3")
    a.grid = Grid(a.optimizers, a.ranks, a.scalings, rates, a.seeds)
    return a


def load_model(a: argparse.Namespace) -> tuple[Decoder, Any, Any]:
    """Return (model, variables, tokenizer)."""
    if a.model == "tiny":
        model = Decoder(TINY)
        shape = jax.numpy.zeros((1, 1), "int32")
        return model, jax.jit(model.init)(jax.random.key(0), shape), ByteTokenizer()
    where = None if a.model == "smollm2" else a.model
    config, variables, tokenizer = load_file(where, dtype=a.dtype, remat=a.remat, dequantize=True)
    return Decoder(config), variables, tokenizer


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        return run(a)
    except ValueError as error:
        print(f"rank_sweep: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rank_sweep: interrupted; finished trials are kept in {a.out}: run it again to go on", file=sys.stderr)
        return 130


def run(a: argparse.Namespace) -> int:
    begun = time.monotonic()
    deadline = float("inf") if a.budget is None else begun + 60 * a.budget
    digest = hashlib.sha256(a.data.read_bytes()).hexdigest()[:16] if a.data else "docstrings"
    names = ("model", "alpha", "steps", "batch_size", "max_len", "heldout", "layers", "dtype")
    trials = a.out / "trials.jsonl"
    store.begin(trials, {name: getattr(a, name) for name in names} | {"data": digest}, a.start)

    model, variables, tokenizer = load_model(a)
    found = split(Asked(a.data and str(a.data), a.heldout, rule=1))  # as in the runs that were measured before
    training, held = found.training, found.heldout
    rows, held = (train.prepare(tokenizer, part, max_len=a.max_len) for part in (training, held))
    print(f"training data: {rows.statistics}\nheld-out data: {held.statistics}", flush=True)
    loss = train.token_loss(max(rows.places, held.places))
    heldout = list(train.heldout_batches(held, batch_size=a.batch_size))
    before = base_loss(model, variables, loss, heldout)
    print(f"held-out loss of the base: {before:.4f}", flush=True)
    # The functions are made once: a sweep with the same ones compiles nothing again.
    optimizers = {name: partial(make_optimizer, name) for name in a.optimizers}

    @functools.cache
    def wrap(rank: int, init: Any = "uniform") -> rslora.Lora:
        options = {"targets": TARGETS[a.layers], "allow_large_rank": True, "init": init}
        config = rslora.LoraConfig(rank=rank, alpha=a.alpha, **options)
        return rslora.wrap(model.apply, variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)

    per_rank = cost_of_a_rank(wrap(a.ranks[0]), a.ranks[0], variables)

    def cost(spec):
        return 1 + per_rank * spec.rank

    def pace(done):
        return statistics.median(t["seconds"] / cost(spec) for spec, t in done.items()) if done else None

    done, cut = store.load(trials), False
    while unit := a.grid.next_unit(done, a.together):
        seconds = pace(done)
        due = seconds and sum(seconds * cost(spec) for spec in unit)
        # The guess may be of slower hours, or too kind: a unit begun in vain is given up after a few steps.
        if time.monotonic() + (due or 0) / 2 > deadline:
            cut = True
            break
        told = Teller(unit, done, a.grid, due, deadline, pace, cost)
        started = time.monotonic()
        try:
            lora = wrap(unit[0].rank, smaller_by_rank if unit[0].scaling == INIT_ONLY else "uniform")
            outcomes = train_unit(a, lora, variables, unit, rows, loss, optimizers, heldout, told)
        except OutOfTime:
            cut = True
            break
        for spec, outcome in zip(unit, outcomes, strict=True):
            store.save(trials, spec, outcome, (time.monotonic() - started) / len(unit))
        done = store.load(trials)
        store.write_csv(a.out / "results.csv", done)
        told.end(outcomes)
    return report(a, done, before, pace, cost, cut, time.monotonic() - begun)


def cost_of_a_rank(lora: rslora.Lora, rank: int, variables: Any) -> float:
    """Return what one more rank adds to a step, over what the base alone costs, from adapters that are all of a rank.

    That is 6 operations for each of its numbers and a token, where the base takes 4.
    """
    return 1.5 * lora.num_parameters / rank / sum(leaf.size for leaf in jax.tree.leaves(variables))


def smaller_by_rank(key: Any, shape: tuple[int, ...], dtype: Any, fan_in: int) -> Any:
    """Draw A as usual, over the square root of its rank."""
    return uniform(key, shape, dtype, fan_in) / math.sqrt(shape[-1])


def make_optimizer(name: str, rate: Any) -> Any:
    return train.make_optimizer(name, schedule=rate, clip=None)


def base_loss(model: Decoder, variables: Any, loss: train.Loss, heldout: list[Any]) -> float:
    """Return the held-out loss without adapters."""
    evaluate = jax.jit(lambda variables, batch: loss(partial(model.apply, variables), batch))
    sums = [evaluate(variables, batch) for batch in heldout]
    return sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)


def train_unit(
    a: argparse.Namespace,
    lora: rslora.Lora,
    variables: Any,
    unit: list[Spec],
    rows: train.Rows,
    loss: train.Loss,
    optimizers: dict[str, Any],
    heldout: list[Any],
    progress: Any,
) -> list[Outcome]:
    """Train the trials of one rank and optimiser together."""
    return sweep(
        lora,
        variables,
        [Trial(spec.rate, spec.seed, GAMMAS[spec.scaling]) for spec in unit if spec.rate],
        batches=lambda seed: train.train_batches(rows, batch_size=a.batch_size, seed=seed),
        loss=loss,
        optimizer=optimizers[unit[0].optimizer],
        steps=a.steps,
        heldout=heldout,
        progress=progress,
    )


class Teller:
    """Say how far the sweep is, at most every 15 seconds, and stop it when its time is over."""

    def __init__(self, unit: list[Spec], done: Any, grid: Grid, due: Any, deadline: float, pace: Any, cost: Any):
        self.unit, self.deadline, self.begun, self.said = unit, deadline, time.monotonic(), 0.0
        self.count, rest = len(done), [spec for spec in grid.left(done) if spec not in unit]
        self.total = len(done) + len(unit) + len(rest)
        self.rest = None if due is None else pace(done) * sum(map(cost, rest))

    def __call__(self, step: int, steps: int) -> None:
        now = time.monotonic()
        if now > self.deadline and step < steps:
            raise OutOfTime
        if step == 1:
            self.begun = now  # what came before is compilation
            return
        spec, here = self.unit[0], (now - self.begun) * (steps - step) / max(1, step - 1)
        if step > 3 and now + here > self.deadline:
            raise OutOfTime
        if now - self.said < 15 and step < steps:
            return
        self.said = now
        left = f"about {clock(here)} left of these" + (
            "" if self.rest is None else f", {clock(here + self.rest)} of all"
        )
        print(
            f"trials {self.count + 1} to {self.count + len(self.unit)} of {self.total} "
            f"({spec.optimizer}, rank {spec.rank}), step {step}/{steps}, {left}",
            flush=True,
        )

    def end(self, outcomes: list[Any]) -> None:
        for spec, outcome in zip(self.unit, outcomes, strict=True):
            bad = "" if outcome.diverged is None else f", diverged at step {outcome.diverged}"
            held = outcome.heldout[len(outcome.losses)]
            print(f"  {spec.name}: held-out loss {held.loss:.4f} ± {held.error:.4f}{bad}", flush=True)


def report(
    a: argparse.Namespace, done: dict[Spec, Any], before: float, pace: Any, cost: Any, cut: bool, took: float
) -> int:
    """Draw the figures, write the table, and say what is left out."""
    left = a.grid.left(done)
    if done:
        files = maps.draw_all(f"{a.out}/", a.grid, done)
        text = figures.table(a.grid, done) + "\n" + maps.rate_table(a.grid, done)
        text += f"\nHeld-out loss of the base, without adapters: {before:.4f}.\n"
        text += left_out(left)
        store.write(a.out / "table.md", text)
        print(f"\n{text}\nwrote {', '.join(str(f) for f in [a.out / 'results.csv', a.out / 'table.md', *files])}")
    else:
        print(left_out(left))
    if left:
        seconds = pace(done)
        time_left = f" (about {clock(seconds * sum(map(cost, left)))})" if seconds else ""
        print(f"{'the budget ended' if cut else 'stopped'} after {clock(took)}: run it again to go on{time_left}")
    return 0


def left_out(left: list[Spec]) -> str:
    """Say which trials are not done, by optimiser and rank."""
    if not left:
        return "\nNothing was left out.\n"
    counts = collections.Counter((spec.optimizer, spec.rank) for spec in left)
    listed = ", ".join(f"{optimizer} rank {rank}: {count}" for (optimizer, rank), count in counts.items())
    return f"\nLeft out so far: {len(left)} trials ({listed}).\n"


if __name__ == "__main__":
    sys.exit(main())
