"""Is another method or start worth it? Held-out loss, step time and memory of each, at its best of three rates.

    python scripts/compare_methods.py --model tiny --steps 10                 # to try it out: two minutes
    python scripts/compare_methods.py --data train.jsonl --budget 120         # SmolLM2-135M, as in docs/methods

rsLoRA, DoRA, LoRA+, the starts PiSSA, OLoRA, EVA and LoRA-GA, and full fine-tuning of the same weights, all by AdamW at
a constant rate, without clipping, for equal steps on the same batches. Every method is run at its three rates, then at
its best with the other seeds; where the best is the least or the largest, that is marked, as more may be had beyond. A
seed is that of the adapters and of the data's order. A finished run is kept in --out, and a rerun does only what is not
there, so that hours can be done in parts of --budget minutes. In --out are trials.jsonl with the curves, table.md and
loss.png.

"memory" is what the compiled step takes, arguments and temporaries; "step" the median of a run's steps, which says
little where the machine did other things too: --time measures a few steps of each in turn, and the table has those,
with their memory.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rank_sweep import load_model

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.commands.heldout import Asked, split
from rslora_jax.train.report import clock


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the table: what the config has beside rank and alpha, where training starts, and at which rates."""

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: str | None = None
    plus: float | None = None
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)


LINEAR = "*/{q,k,v,o,gate,up,down}_proj/kernel"
KINDS = {
    "rsLoRA": Kind(),
    "DoRA": Kind({"method": "dora"}),
    "LoRA+ (16)": Kind(plus=16.0, rates=(1e-5, 3e-5, 1e-4)),
    "PiSSA": Kind(start="pissa:16", rates=(3e-5, 1e-4, 3e-4)),
    "OLoRA": Kind(start="olora", rates=(1e-5, 3e-5, 1e-4)),
    "EVA": Kind(start="eva", rates=(3e-5, 1e-4, 3e-4)),
    "LoRA-GA": Kind(start="lora-ga", rates=(3e-5, 1e-4, 3e-4)),
    "full": Kind({"targets": (), "trained": LINEAR}, rates=(3e-5, 1e-4, 3e-4)),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    kind: str
    rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Job:
    """The model, its data and the settings that all runs have in common."""

    a: argparse.Namespace
    apply: Any
    variables: Any
    rows: Any
    loss: Any
    heldout: list[Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny (random, of bytes) or a GGUF file (smollm2)")
    add(
        "--data", type=Path, help="a .jsonl, .parquet or .txt file, every tenth example held out (docstrings of Python)"
    )
    add("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=f"of {', '.join(KINDS)} (all)")
    add("--rank", type=int, default=32, help="of all adapters (32)")
    add("--alpha", type=float, default=16.0, help="numerator of the scale (16)")
    add("--seeds", type=int, default=2, help="at the best rate of each (2)")
    add("--steps", type=int, default=60, help="of each run (60)")
    add("--batch-size", type=int, default=2, help="rows of a step (2)")
    add("--max-len", type=int, default=256, help="tokens of a row (256)")
    add("--heldout", type=int, default=64, help="at most so many held-out examples (64)")
    add("--start-batches", type=int, default=8, help="that EVA and LoRA-GA look at (8)")
    add("--budget", type=float, help="minutes after which to begin no further run (until all is done)")
    add("--time", type=int, metavar="STEPS", help="only measure so many steps of each, in turn, and write times.json")
    add("--out", type=Path, default=Path("runs/compare_methods"), help="folder of the results (runs/compare_methods)")
    a = parser.parse_args(argv)
    a.dtype, a.remat = "float32", "none"
    if unknown := [name for name in a.kinds if name not in KINDS]:
        parser.error(f"--kinds {unknown[0]} is not one of {', '.join(KINDS)}")
    if a.data and not a.data.is_file():
        parser.error(f"--data {a.data} is no file")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        job, done = prepared(a), begin(a)
        return measure_times(job) if a.time else run(job, done)
    except ValueError as error:
        print(f"compare_methods: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"compare_methods: interrupted; finished runs are kept in {a.out}: run it again", file=sys.stderr)
        return 130


def prepared(a: argparse.Namespace) -> Job:
    """Load the model and the data."""
    model, variables, tokenizer = load_model(a)
    found = split(Asked(a.data and str(a.data), a.heldout, rule=1))  # as in the runs that were measured before
    training, held = found.training, found.heldout
    rows, held = (train.prepare(tokenizer, part, max_len=a.max_len) for part in (training, held))
    print(f"training data: {rows.statistics}\nheld-out data: {held.statistics}", flush=True)
    loss = train.token_loss(max(rows.places, held.places))
    return Job(a, model.apply, variables, rows, loss, list(train.heldout_batches(held, batch_size=a.batch_size)))


def begin(a: argparse.Namespace) -> dict[Trial, dict[str, Any]]:
    """Return the runs that --out has, which must be of the same settings."""
    names = ("model", "rank", "alpha", "steps", "batch_size", "max_len", "heldout", "start_batches")
    digest = hashlib.sha256(a.data.read_bytes()).hexdigest()[:16] if a.data else "docstrings"
    settings = {name: getattr(a, name) for name in names} | {"data": digest}
    file = a.out / "trials.jsonl"
    a.out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    first, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    for name, value in settings.items():
        if first["settings"].get(name) != value:
            raise ValueError(f"{file} is of {name} {first['settings'].get(name)}, not {value}: give another --out")
    return {Trial(**line.pop("trial")): line for line in lines}


def wrapped(job: Job, kind: Kind) -> rslora.Lora:
    config = rslora.LoraConfig(rank=job.a.rank, alpha=job.a.alpha, **{"targets": LINEAR, **kind.config})
    return rslora.wrap(job.apply, job.variables, jax.ShapeDtypeStruct((1, 8), "int32"), config=config)


def started(job: Job, kind: Kind, lora: rslora.Lora, seed: int) -> tuple[Any, Any]:
    """Return (base, adapters) as training starts with them."""
    key = jax.random.key(seed)
    if kind.start is None:
        return job.variables, lora.init(key, job.variables)
    few = [batch for batch, _ in zip(batches(job, seed), range(job.a.start_batches), strict=False)]
    return rslora.starts.begin(kind.start, lora, job.variables, key, loss=job.loss, batches=few)


def batches(job: Job, seed: int) -> Any:
    return iter(train.train_batches(job.rows, batch_size=job.a.batch_size, seed=seed))


def optimizer_of(kind: Kind, lora: rslora.Lora, rate: float) -> Any:
    base = train.make_optimizer("adamw", schedule=rate, clip=None)
    return base if kind.plus is None else optax.chain(base, train.lora_plus(lora, kind.plus))


def run_one(job: Job, trial: Trial, lora: rslora.Lora) -> dict[str, Any]:
    """Train once and return what is kept of it."""
    kind = KINDS[trial.kind]
    begun = time.monotonic()
    params, adapters = started(job, kind, lora, trial.seed)
    start_s = time.monotonic() - begun
    optimizer = optimizer_of(kind, lora, trial.rate)
    step = train.make_step(lora, job.loss, optimizer)
    state = train.TrainState.create(adapters, optimizer)
    stream, losses, seconds = batches(job, trial.seed), [], []
    memory = memory_of(step, state, params, next(batches(job, trial.seed)))
    for _ in range(job.a.steps):
        begun = time.monotonic()
        state, metrics = step(state, params, next(stream))
        losses.append(float(metrics["loss"]))
        seconds.append(time.monotonic() - begun)
    return {
        "heldout_loss": heldout_loss(job, lora, params, state.adapters),
        "losses": [float(f"{loss:.5g}") for loss in losses],
        "step_s": statistics.median(seconds[1:]),
        "start_s": start_s,
        "memory": memory,
        "parameters": lora.num_parameters,
    }


def memory_of(step: Any, *arguments: Any) -> int:
    """Return the bytes that a compiled step takes, arguments and temporaries."""
    memory = step.lower(*arguments).compile().memory_analysis()
    return int(memory.temp_size_in_bytes + memory.argument_size_in_bytes)


def heldout_loss(job: Job, lora: rslora.Lora, params: Any, adapters: Any) -> float:
    evaluate = train.make_evaluate(lora, job.loss)
    sums = [evaluate(params, adapters, batch) for batch in job.heldout]
    return sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)


def left(a: argparse.Namespace, done: Mapping[Trial, Any]) -> list[Trial]:
    """Return the runs to come, in the order of use: the middle rate of all, their other rates, their other seeds."""
    order = [Trial(name, KINDS[name].rates[n], 0) for n in (1, 0, 2) for name in a.kinds]
    for name in a.kinds:
        if (best := best_rate(name, done)) is not None:
            order += [Trial(name, best, seed) for seed in range(1, a.seeds)]
    return [trial for trial in order if trial not in done]


def best_rate(name: str, done: Mapping[Trial, Any]) -> float | None:
    """Return the rate with the least held-out loss at the first seed; None before all are run."""
    first = {trial.rate: of["heldout_loss"] for trial, of in done.items() if (trial.kind, trial.seed) == (name, 0)}
    if not first.keys() >= {*KINDS[name].rates}:
        return None
    return min(first, key=lambda rate: np.nan_to_num(first[rate], nan=np.inf))


def run(job: Job, done: dict[Trial, dict[str, Any]]) -> int:
    a, begun = job.a, time.monotonic()
    wrap = functools.cache(lambda name: wrapped(job, KINDS[name]))
    count = 0
    while trials := left(a, done):
        spent = time.monotonic() - begun
        if a.budget is not None and spent + (spent / count if count else 0) > 60 * a.budget:
            print(f"the budget is over: {len(trials)} runs or more are left; run it again to go on")
            break
        trial = trials[0]
        done[trial] = found = run_one(job, trial, wrap(trial.kind))
        with (a.out / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": dataclasses.asdict(trial)} | found) + "\n")
        count += 1
        expected = len(a.kinds) * (3 + a.seeds - 1)
        ahead = (time.monotonic() - begun) / count * (expected - len(done))
        print(
            f"{len(done)} of {expected}: {trial.kind} at {trial.rate:g}, seed {trial.seed}: held-out loss "
            f"{found['heldout_loss']:.4f}, {found['step_s']:.3g} s a step; left: {clock(max(ahead, 0))}",
            flush=True,
        )
    untrained = wrapped(job, KINDS["rsLoRA"])
    before = heldout_loss(job, untrained, job.variables, untrained.init(jax.random.key(0)))
    text = f"{table(job, done)}\nBefore training the held-out loss is {before:.4f}.\n"
    (a.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    draw(a, done)
    return 0


def table(job: Job, done: Mapping[Trial, Any]) -> str:
    """Write the table in Markdown."""
    file = job.a.out / "times.json"
    times = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lines = [
        "| method | trained | best rate | held-out loss | by seed | step | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in job.a.kinds:
        if (best := best_rate(name, done)) is None:
            continue
        runs = [
            of
            for trial, of in sorted(done.items(), key=lambda one: one[0].seed)
            if (trial.kind, trial.rate) == (name, best)
        ]
        losses, rates = [of["heldout_loss"] for of in runs], KINDS[name].rates
        edge = {min(rates): " (the least)", max(rates): " (the largest)"}.get(best, "")
        step, memory = times.get(name, (statistics.median(of["step_s"] for of in runs), runs[0]["memory"]))
        lines.append(
            f"| {name} | {runs[0]['parameters'] / 1e6:.2f} M | {best:g}{edge} | {np.mean(losses):.4f} | "
            f"{', '.join(f'{loss:.4f}' for loss in losses)} | {step:.3g} s | {memory / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def measure_times(job: Job) -> int:
    """Measure a few steps of each in turn, all in one process, and keep the median of each."""
    steps, memory = {}, {}
    batch = next(batches(job, 0))
    for name in job.a.kinds:
        kind = KINDS[name]
        lora = wrapped(job, kind)
        optimizer = optimizer_of(kind, lora, kind.rates[0])
        adapters = lora.init(jax.random.key(0), job.variables)  # however it starts, a step is the same
        step, state = train.make_step(lora, job.loss, optimizer), train.TrainState.create(adapters, optimizer)
        steps[name], memory[name] = [step, state, []], memory_of(step, state, job.variables, batch)
    for turn in range(job.a.time + 1):
        for one in steps.values():
            begun = time.monotonic()
            one[1], metrics = one[0](one[1], job.variables, batch)
            metrics["loss"].block_until_ready()
            if turn:  # the first compiles
                one[2].append(time.monotonic() - begun)
    times = {name: (statistics.median(seconds), memory[name]) for name, (_, _, seconds) in steps.items()}
    (job.a.out / "times.json").write_text(json.dumps(times), encoding="utf-8")
    for name, (_, _, seconds) in steps.items():
        print(f"{name:12} {times[name][0]:.3f} s a step, {min(seconds):.3f} to {max(seconds):.3f}")
    return 0


def draw(a: argparse.Namespace, done: Mapping[Trial, Any]) -> None:
    """Draw held-out loss by rate for each method, and the training loss at its best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name in a.kinds:
        points = sorted(
            (trial.rate, of["heldout_loss"]) for trial, of in done.items() if (trial.kind, trial.seed) == (name, 0)
        )
        if not points:
            continue
        (line,) = left_axes.plot(*zip(*points, strict=True), marker="o", label=name)
        if (best := best_rate(name, done)) is not None:
            losses = np.array(done[Trial(name, best, 0)]["losses"])
            window = max(1, len(losses) // 8)
            smooth = np.convolve(losses, np.ones(window) / window, "valid")
            right_axes.plot(np.arange(len(smooth)) + window, smooth, color=line.get_color(), label=name)
    left_axes.set(
        xscale="log", xlabel="learning rate", ylabel="held-out loss (nats a token)", title="by rate, first seed"
    )
    right_axes.set(xlabel="step", ylabel="training loss, running mean", title="at the best rate, the same batches")
    if done:
        left_axes.legend()
    figure.savefig(a.out / "loss.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
