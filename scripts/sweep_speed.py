"""Measure runs trained together (`train.sweep`'s step) beside the same runs in turn, on SmolLM2.

    python scripts/sweep_speed.py [--runs 8] [--rank 8] [--batch-size 1] [--max-len 128] [--repeats 5]

A row of the table is one way to take a step of every run: together in one program, or one after the other by
`make_step`. Both do the same work on the same data; they take turns, so that a slow minute meets both alike. Seconds
are for a step of all runs, as median, least and most of the repeats. Memory is the compiled program's: its arguments
(base, adapters, optimiser's state, batch) and what it needs beside them. In turn, one run at a time is in memory, and
the time to compile is that of one rate: `make_step` compiles for each.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rslora_jax as rslora
from rslora_jax import train
from rslora_jax.interop.gguf import find_smollm2, load_gguf
from rslora_jax.models.decoder import Decoder
from rslora_jax.train.sweep import Trial, make_sweep_step, scaling_factors, stack, starting_states


def compiled(step: Any, *arguments: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    program = step.lower(*arguments).compile()
    return program, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("runs", 8), ("rank", 8), ("batch-size", 1), ("max-len", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    a = parser.parse_args()

    config, variables, tokenizer = load_gguf(find_smollm2(), scan_layers=True, dequantize=True)
    shape = jax.ShapeDtypeStruct((1, 8), "int32")
    lora = rslora.wrap(Decoder(config).apply, variables, shape, config=rslora.LoraConfig(rank=a.rank, alpha=16))
    rows = train.prepare(tokenizer, train.docstring_pairs("train")[:200], max_len=a.max_len)
    loss, optimizer = train.token_loss(rows.places), optax.adam
    scalings = ("rslora", "lora")
    trials = [Trial(1e-4 * (1 + n), seed=n, scaling=scalings[n % 2]) for n in range(a.runs)]
    batch = stack([train.train_batches(rows, batch_size=a.batch_size, seed=t.seed)[0] for t in trials])
    rates, factors = jnp.asarray([t.learning_rate for t in trials]), scaling_factors(lora, trials)

    together = starting_states(lora, trials, optimizer, rates)
    alone = [train.TrainState.create(lora.init(jax.random.key(t.seed)), optimizer(t.learning_rate)) for t in trials]
    one = jax.tree.map(lambda rows: rows[0], batch)
    alone_step = train.make_step(lora, loss, optimizer(1e-4))
    whole, whole_s = compiled(make_sweep_step(lora, loss, optimizer), together, rates, factors, variables, batch)
    single, single_s = compiled(alone_step, alone[0], variables, one)

    def all_together() -> None:
        nonlocal together
        together, _ = whole(together, rates, factors, variables, batch)
        jax.block_until_ready(together)

    def in_turn() -> None:
        for n in range(a.runs):
            alone[n], _ = single(alone[n], variables, jax.tree.map(lambda rows, n=n: rows[n], batch))
        jax.block_until_ready(alone)

    ways: dict[str, tuple[Callable[[], None], Any, float]] = {
        f"{a.runs} together": (all_together, whole, whole_s),
        f"{a.runs} in turn": (in_turn, single, single_s),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(a.repeats + 1):
        for name, (take, _, _) in ways.items():
            begun = time.perf_counter()
            take()
            if repeat:
                times[name].append(time.perf_counter() - begun)
        print(f"repeat {repeat}/{a.repeats} done", flush=True)

    print(f"\nrank {a.rank}, {a.runs} runs, {a.batch_size} x {a.max_len} tokens each, {jax.devices()[0].device_kind}\n")
    print("| way | s a step of all | least to most | arguments MB | temporary MB | compile s |")
    print("|---|---|---|---|---|---|")
    for name, (_, program, compile_s) in ways.items():
        memory, took = program.memory_analysis(), times[name]
        print(
            f"| {name} | {statistics.median(took):.2f} | {min(took):.2f} to {max(took):.2f} "
            f"| {memory.argument_size_in_bytes / 1e6:.0f} | {memory.temp_size_in_bytes / 1e6:.0f} "
            f"| {compile_s:.1f} |"
        )
    ratios = [turn / all_ for all_, turn in zip(*times.values(), strict=True)]
    print(f"\ntogether is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
